"""The miniature's tasks: the same file names and shapes as the official data sets, images in PNG, made-up words."""

from __future__ import annotations

from dataclasses import replace

from pipeline.scores.chair import MINIATURE_WORDS
from pipeline.tasks import tasks
from pipeline.tasks.captions import COCO
from pipeline.tasks.vqa import OKVQA, VQAV2

IMAGE = "COCO_{subset}_{image_id:012d}.png"  # of the questions; of the captions, `file_name` says where each PNG is

for task in (
    replace(VQAV2, name="mini-vqa", image=IMAGE, official_evaluation=None),
    replace(OKVQA, name="mini-okvqa", image=IMAGE, stemmed_references=False, official_evaluation=None),
    replace(COCO, name="mini-coco", object_words=MINIATURE_WORDS, official_evaluation=None),
):
    tasks.register(task)
