"""What training costs a step (HiFICL Figures 5 and 10), and an answer (Figure 6), measured: time, FLOPs, memory."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from pipeline.config.load import TrialRequest
from pipeline.core.errors import WorkError
from pipeline.measure import Measure, Measured, MeasureJob, Numbers, measures, middle
from pipeline.records.trial import TrialReport
from pipeline.train.workbench import Workbench

_CPU_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_CPU_ATTENTION_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


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

    def run(self, bench: Workbench, jobs: Sequence[MeasureJob]) -> list[Measured]:
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
        return [Measured(numbers) for numbers in costs]

    def _short(self, request: TrialRequest, folder: Path) -> TrialRequest:
        """Return the trial with few samples, enough epochs, and one selection sample."""
        config = request.config
        training = {"num_train_samples": min(self.num_samples, config.num_train_samples), "epochs": self.rounds + 2}
        selection = {"selection": "selection", "num_selection_samples": 1, "selection_metric": "loss"}
        few = config.model_copy(update={**training, **selection})
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


def _forward(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query.shape, key.shape, value.shape)


def _backward(gradient: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(gradient.shape, query.shape, key.shape, value.shape)


class CountedFlops(TorchDispatchMode):
    """Counts while it is entered, forward and backward; `total` holds the sum.

    torch's own FlopCounterMode also follows modules by hooks, which a backward pass that ends at an adapter breaks, and
    its table lacks the CPU's fused attention.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0
        self._own: dict[Any, Any] = {_CPU_ATTENTION: _forward, _CPU_ATTENTION_BACKWARD: _backward}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count it."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        packet = func._overloadpacket
        if packet in self._own:
            self.total += self._own[packet](*args, **kwargs)
        elif packet in flop_registry:
            count: Any = flop_registry[packet]
            self.total += count(*args, **kwargs, out_val=out)
        return out


@dataclass
class Peak:
    """Bytes above what was held at the start; filled at the end of the block."""

    value: int = 0


@contextmanager
def peak_bytes(cuda: bool) -> Iterator[Peak]:
    """Measure the highest sum of torch's allocations inside the block, what was held before left out."""
    peak = Peak()
    if cuda:
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        yield peak
        torch.cuda.synchronize()
        peak.value = torch.cuda.max_memory_allocated() - before
        return
    # the CPU's allocator keeps no statistics; the profiler sees each of its calls
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        yield peak
    calls = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = 0
    for event in sorted(calls, key=lambda call: call.start_ns()):
        held += event.nbytes()
        peak.value = max(peak.value, held)


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

    def run(self, bench: Workbench, jobs: Sequence[MeasureJob]) -> list[Measured]:
        """Return the rows' milliseconds a sample."""
        times: list[list[float]] = [[] for _ in jobs]
        for _ in range(self.rounds + 1):
            for index, job in enumerate(jobs):
                few = min(self.num_samples, job.evaluation.num_samples or self.num_samples)
                evaluation = bench.score(job.request, job.evaluation.model_copy(update={"num_samples": few}))
                times[index].append((evaluation.seconds or 0.0) / evaluation.num_samples)
        return [Measured({"milliseconds_per_sample": 1000 * middle(row[1:])}) for row in times]
