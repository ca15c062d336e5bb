"""OK-VQA (okvqa.allenai.org): 9,009 training and 5,046 test questions on COCO 2014 images.

References and target are the `answer` field (stemmed in release 1.0 and, otherwise, in 1.1), as in the
official score; `raw_answer`, the typed text, is not used.
"""

from __future__ import annotations

from pipeline.tasks import tasks
from pipeline.tasks.vqa_files import VqaTask

OKVQA = VqaTask(
    name="okvqa",
    stands_for="okvqa",
    folders=("okvqa", "ok_vqa", "OK-VQA", "."),
    questions="OpenEnded_mscoco_{subset}_questions.json",
    annotations="mscoco_{subset}_annotations.json",
    official_evaluation=5_046,
    stemmed_references=True,
)
tasks.register(OKVQA)
