"""The miniature's okvqa: the same file names and shapes as the official data set, images in PNG."""

from __future__ import annotations

from dataclasses import replace

from pipeline.tasks import tasks
from pipeline.tasks.okvqa import OKVQA

IMAGE = "COCO_{subset}_{image_id:012d}.png"
tasks.add(
    "mini-okvqa",
    replace(OKVQA, name="mini-okvqa", image=IMAGE, stemmed_references=False, official_evaluation=None),
)
