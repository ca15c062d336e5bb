"""The miniature's captions: the same file names and shapes as COCO 2014's; file_name says where each PNG is."""

from __future__ import annotations

from dataclasses import replace

from pipeline.scores.objects import MINIATURE_WORDS
from pipeline.tasks import tasks
from pipeline.tasks.coco import COCO

tasks.add("mini-coco", replace(COCO, name="mini-coco", object_words=MINIATURE_WORDS, official_evaluation=None))
