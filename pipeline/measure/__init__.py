"""What a measure is: what it is given, what it gives back, and the measures that need no model."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from pydantic import BaseModel, ConfigDict

from pipeline.config.load import TrialRequest
from pipeline.config.trial import EvaluationConfig
from pipeline.core.errors import InputError, validate
from pipeline.core.registry import Registry
from pipeline.records.evaluation import Evaluation, LayerValues
from pipeline.tasks import tasks
from pipeline.tasks.caption_files import CaptionTask
from pipeline.train.workbench import Workbench

Numbers = dict[str, float]


class Measured(NamedTuple):
    """What a trial was measured as: numbers by name and, where the measure tells, the same layer by layer."""

    numbers: Numbers
    layers: LayerValues | None = None


@dataclass(frozen=True)
class MeasureJob:
    """One scored trial to measure, of a study's row; `data_root` has the official files."""

    row: str
    request: TrialRequest
    evaluation: EvaluationConfig
    scored: Evaluation
    data_root: str


class Measure(BaseModel):
    """One measure; its fields are its settings (`measured` of a study).

    Attributes:
        metric: name of the cell's number; None: the score itself.
        units: of every number that it gives.
        ratios: numbers that become a ratio to the reference row's, by the name of what they are made from.
        revision: of the way it measures; with a higher one what was measured before is measured again.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: ClassVar[str] = ""
    metric: ClassVar[str | None] = None
    units: ClassVar[Mapping[str, str]] = {}
    ratios: ClassVar[Mapping[str, str]] = {}
    revision: ClassVar[int] = 1

    def run(self, bench: Workbench, jobs: Sequence[MeasureJob]) -> list[Measured]:
        """Measure jobs of one backbone and task side by side, one result a job."""
        return [Measured({}) for _ in jobs]

    def relate(self, numbers: Numbers, reference: Numbers | None) -> Numbers:
        """Add the ratios to the reference row's numbers."""
        related = dict(numbers)
        for name, source in self.ratios.items():
            base = (reference or {}).get(source)
            if base and source in numbers:
                related[name] = self.ratio(numbers[source], base)
        return related

    def ratio(self, value: float, reference: float) -> float:
        """Return how a value stands to the reference row's."""
        return value / reference


measures: Registry[type[Measure]] = Registry("measure", __name__, "hificl.measures")


@measures.register
class ScoreAlone(Measure):
    """The task's own score; nothing is measured beside it."""

    name = "score"


@measures.register
class Qualitative(Measure):
    """Answers side by side (layout `gallery`); the score stands with them."""

    name = "qualitative"


@measures.register
class Hallucination(Measure):
    """CHAIR_s, CHAIR_i and recall of objects in the captions that were scored, by COCO's instances (HiFICL Table 3)."""

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


def create_measure(name: str, settings: Mapping[str, Any], where: str) -> Measure:
    """Return a measure with its settings.

    Raises:
        InputError: no such measure, or a setting that it does not have.
    """
    return validate(measures.get(name), dict(settings), where, noun="setting")


def middle(values: Sequence[float]) -> float:
    """Return the median: one disturbed round does not move it."""
    return statistics.median(values)
