"""CHAIR of the captions that were scored (HiFICL Table 3); no model is needed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from pipeline.core.errors import InputError
from pipeline.measure import Measure, Measured, MeasureJob, measures
from pipeline.tasks import tasks
from pipeline.tasks.caption_files import CaptionTask
from pipeline.train.workbench import Workbench


@measures.register
class Hallucination(Measure):
    """CHAIR_s, CHAIR_i and the recall of objects, by the official instances and the reference captions."""

    name = "hallucination"
    metric: ClassVar[str | None] = "chair_s"
    units: ClassVar[dict[str, str]] = {"chair_s": "fraction", "chair_i": "fraction", "recall": "fraction"}

    def run(self, bench: Workbench, jobs: Sequence[MeasureJob]) -> list[Measured]:
        """Return the scores of each job's captions.

        Raises:
            InputError: the task has no annotated objects, or objects that CHAIR does not know.
        """
        return [self._scores(job) for job in jobs]

    def _scores(self, job: MeasureJob) -> Measured:
        task = tasks.get(job.request.config.task)
        if not isinstance(task, CaptionTask):
            raise InputError("has no annotated objects", where=task.name, way_out="Use a task of COCO captions")
        answers = {str(answer.sample_id): answer for answer in job.scored.predictions}
        captions = {key: answer.prediction for key, answer in answers.items()}
        references = {key: answer.references for key, answer in answers.items()}
        score = task.chair(Path(job.data_root), "evaluation", captions, references)
        return Measured({"chair_s": score.CHAIRs, "chair_i": score.CHAIRi, "recall": score.recall})
