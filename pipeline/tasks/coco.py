"""COCO 2014 captions (cocodataset.org): 82,783 training and 40,504 validation images."""

from __future__ import annotations

from pipeline.tasks import tasks
from pipeline.tasks.caption_files import CaptionTask

COCO = CaptionTask(name="coco", stands_for="coco", folders=("coco/annotations", "annotations", "coco", "."))
tasks.add(COCO.name, COCO)
