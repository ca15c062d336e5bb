"""What a step of training costs, measured: time, FLOPs and memory (HiFICL Figures 5 and 10)."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import torch
from pydantic import Field

from pipeline.config.request import TrialRequest
from pipeline.core.errors import WorkError
from pipeline.measure.base import Measure, MeasureJob, Numbers, measures, middle
from pipeline.measure.counters import CountedFlops, peak_bytes
from pipeline.records.epoch import TrialReport
from pipeline.train.workbench import Workbench


@measures.register
class TrainingCost(Measure):
    """Milliseconds, FLOPs and peak memory of training, a sample; each as a ratio to the reference row's.

    Every row trains its own settings on the same first samples, epoch by epoch in alternation with the other rows, so
    that a time in which the machine is slower affects all of them. The first epoch fills the caches of prompts and
    visual tokens and is not counted, as in a real run where it is one of many. A teacher's forward passes count as
    training.
    """

    name = "training_cost"
    num_samples: int = Field(64, ge=1)
    rounds: int = Field(3, ge=1)
    metric: ClassVar[str | None] = "time"
    units: ClassVar[dict[str, str]] = {
        "time": "times", "flops": "times", "gpu_memory": "times", "milliseconds_per_sample": "ms",
        "flops_per_sample": "count", "peak_bytes": "count",
    }  # fmt: skip
    ratios: ClassVar[dict[str, str]] = {
        "time": "milliseconds_per_sample", "flops": "flops_per_sample", "gpu_memory": "peak_bytes",
    }  # fmt: skip

    def run(self, bench: Workbench, jobs: Sequence[MeasureJob]) -> list[Numbers]:
        """Return the rows' costs; nothing for rows without training."""
        times: list[list[float]] = [[] for _ in jobs]
        costs: list[Numbers] = [{} for _ in jobs]
        with tempfile.TemporaryDirectory(prefix="hificl-cost-") as folder:
            for number in range(self.rounds + 2):
                for index, job in enumerate(jobs):
                    if not job.request.config.trained:
                        continue
                    request = self._short(job.request, Path(folder))
                    samples = request.config.num_train_samples
                    bench.admit(request)
                    if number <= self.rounds:
                        times[index].append(_seconds(bench.advance()[0]) / samples)
                    else:
                        costs[index] = _counted(bench, samples)
                    bench.evict(request.key)
        for numbers, seconds_by_round in zip(costs, times, strict=True):
            if numbers:
                numbers["milliseconds_per_sample"] = 1000 * middle(seconds_by_round[1:])
        return costs

    def _short(self, request: TrialRequest, folder: Path) -> TrialRequest:
        """Return the trial with few samples, enough epochs, and one selection sample."""
        config = request.config
        few = config.model_copy(
            update={
                "num_train_samples": min(self.num_samples, config.num_train_samples), "epochs": self.rounds + 2,
                "selection": "selection", "num_selection_samples": 1, "selection_metric": "loss",
            }
        )  # fmt: skip
        return replace(request, config=few, folder=str(folder / few.key))


def _seconds(report: TrialReport) -> float:
    """Return what an epoch took.

    Raises:
        WorkError: the trial diverged.
    """
    if report.metrics is None or report.metrics.train_seconds is None:
        raise WorkError("the loss is not finite, so that nothing can be timed", where=report.key)
    return report.metrics.train_seconds


def _counted(bench: Workbench, samples: int) -> Numbers:
    """Return FLOPs and peak memory of one more epoch; counting takes time, so this one is not timed."""
    with CountedFlops() as counter, peak_bytes(torch.cuda.is_available()) as peak:
        bench.advance()
    return {"flops_per_sample": counter.total / samples, "peak_bytes": float(peak.value)}
