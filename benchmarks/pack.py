"""Trials in one forward pass against one after another: `hificl bench pack`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.support.timing import Findings, main, one_thread, report
from benchmarks.support.trials import BACKBONE, Trials, both_ways, train, trials
from pipeline.config.load import TrialRequest
from pipeline.train.workbench import Workbench

RANKS = (8, 4, 2, 1)


def run(
    device: str = "cpu", *, num_trials: Sequence[int] = (2, 4, 8), num_samples: int = 64, repeats: int = 3
) -> dict[str, Any]:
    """Train K HiFICL trials (of different ranks, rates and seeds) together, and the same ones one after another.

    Both on the miniature, resident in one process, by the same loop, from data to optimiser; scoring and checkpoints
    are left out (`train_seconds` of the trials' own records). On a CPU a pack gives each trial the bits that it has
    alone; `bits_over_batched_K` is what that takes, its seconds over those of a pack whose trials share attention too.
    `packed_over_sequential_K` is in samples per second, for the miniature's own step of 8 samples; `_papers_step` for
    the papers' step of 2 x 2. `loss_difference` is the largest difference of the epochs' mean losses, and
    `packed_equals_solo` 1 where, in fp32, every bit of losses and adapters is the same. On a CPU everything runs on
    one thread.

    Args:
        device: cpu or cuda.
        num_trials: K.
        num_samples: of each trial.
        repeats: rounds.
    """
    findings = Findings()
    with one_thread(device), trials(num_samples) as made:
        bench = Workbench(device=device)
        train(bench, [_request(made, 0, "warm-up")])
        for name, step in {"": {}, "_papers_step": {"micro_batch_size": 2, "accumulation": 2}}.items():
            for k in num_trials:
                rounds = both_ways(bench, partial(_requests, made, k, step), repeats)
                findings.add(f"packed_over_sequential_K{k}{name}", rounds, "alone", "together")
                findings.add(f"bits_over_batched_K{k}{name}", rounds, "together", "batched")
        difference, equal = _compared(bench, made, max(num_trials), torch.float32)
        findings.file("loss_difference_fp32", [difference])
        findings.file("packed_equals_solo", [float(equal)])
        bench = Workbench(device=device)
        bench.resident(_request(made, 0, "double")).loaded.model.double()
        findings.file("loss_difference_fp64", [_compared(bench, made, max(num_trials), torch.float64)[0]])
    sizes = {"num_trials": list(num_trials), "num_samples": num_samples, "repeats": repeats, "backbone": BACKBONE}
    return report(findings, device=device, method=run.__doc__, sizes=sizes)


def _request(made: Trials, number: int, place: str, **step: Any) -> TrialRequest:
    options = {"rank": RANKS[number % len(RANKS)]}
    return made.request("hificl", place, options, learning_rate=0.005 * (1 + number / 10), seed=number, **step)


def _requests(made: Trials, k: int, step: dict[str, int], place: str) -> list[TrialRequest]:
    return [_request(made, i, place, **step) for i in range(k)]


def _compared(bench: Workbench, made: Trials, k: int, dtype: torch.dtype) -> tuple[float, bool]:
    """Train k trials alone and together; return the largest difference of their losses, and whether all is equal."""

    def trained(groups: list[list[int]], place: str) -> tuple[list[float], list[Tensor]]:
        losses, parameters = [], []
        for numbers in groups:
            requests = [_request(made, i, f"{place}-{dtype}") for i in numbers]
            for request in requests:
                bench.admit(request)
            adapters = {trial.config.key: trial.adapter.to(dtype) for trial in bench.loop.trials} if bench.loop else {}
            means: dict[str, float | None] = {}
            while reports := bench.advance():
                means |= {report.key: report.metrics.train_loss for report in reports if report.metrics}
            losses += [means[request.key] or 0.0 for request in requests]
            parameters += [x.detach() for request in requests for x in adapters[request.key].parameters()]
        return losses, parameters

    alone, solo = trained([[i] for i in range(k)], "alone")
    together, packed = trained([list(range(k))], "together")
    equal = alone == together and all(torch.equal(a, b) for a, b in zip(solo, packed, strict=True))
    return max(abs(a - b) for a, b in zip(alone, together, strict=True)), equal


if __name__ == "__main__":
    main(run)
