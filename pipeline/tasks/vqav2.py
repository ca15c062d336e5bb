"""VQAv2 (visualqa.org): 443,757 training and 214,354 validation questions on COCO 2014 images."""

from __future__ import annotations

from pipeline.tasks import tasks
from pipeline.tasks.vqa_files import VqaTask

VQAV2 = VqaTask(
    name="vqav2",
    stands_for="vqav2",
    folders=("vqav2", "VQAv2", "."),
    questions="v2_OpenEnded_mscoco_{subset}_questions.json",
    annotations="v2_mscoco_{subset}_annotations.json",
    official_evaluation=214_354,
)
tasks.register(VQAV2)
