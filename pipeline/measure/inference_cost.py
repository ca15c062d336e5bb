"""What an answer costs, measured (HiFICL Figure 6)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field

from pipeline.measure import Measure, MeasureJob, Numbers, measures, middle
from pipeline.train.workbench import Workbench


@measures.register
class InferenceCost(Measure):
    """Milliseconds a sample, and how many times the reference row is faster.

    Prompts, demonstrations and generation as in the evaluation, on the same first samples, in alternation with the
    other rows. Visual tokens are cached after the first, uncounted round: what differs between the rows is the language
    model's part, as it is where demonstrations' images are encoded once.
    """

    name = "inference_cost"
    num_samples: int = Field(64, ge=1)
    rounds: int = Field(3, ge=1)
    metric: ClassVar[str | None] = "speed_up"
    units: ClassVar[dict[str, str]] = {"speed_up": "times", "milliseconds_per_sample": "ms"}
    ratios: ClassVar[dict[str, str]] = {"speed_up": "milliseconds_per_sample"}

    def run(self, bench: Workbench, jobs: Sequence[MeasureJob]) -> list[Numbers]:
        """Return the rows' milliseconds a sample."""
        times: list[list[float]] = [[] for _ in jobs]
        for _ in range(self.rounds + 1):
            for index, job in enumerate(jobs):
                few = min(self.num_samples, job.evaluation.num_samples or self.num_samples)
                evaluation = bench.score(job.request, job.evaluation.model_copy(update={"num_samples": few}))
                times[index].append((evaluation.seconds or 0.0) / evaluation.num_samples)
        return [{"milliseconds_per_sample": 1000 * middle(row[1:])} for row in times]
