"""What a search loses, and what it saves, where its worse trials leave it early: `hificl bench exits`."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.support.timing import Findings, main, one_thread, report
from benchmarks.support.trials import BACKBONE, Trials, trials
from pipeline.config.load import TrialRequest
from pipeline.config.trial import EvaluationConfig
from pipeline.pool.queue import Halving
from pipeline.records.store import TrialFolder
from pipeline.train.workbench import Workbench

RATES, RANKS = (0.0125, 0.025, 0.05, 0.1), (2, 8)  # below the best rate and above it, as a study's own space
RULES = {  # `sweep.early_exit`'s points and share
    "half_and_one": ((0.5, 1.0), 0.5),
    "half": ((0.5,), 0.5),
    "half_a_quarter_stays": ((0.5,), 0.25),
    "quarter_and_half": ((0.25, 0.5), 0.5),
    "half_one_two": ((0.5, 1.0, 2.0), 0.5),
}


@dataclass(frozen=True)
class Trained:
    """A trial of a search: its score in per cent, and its loss at each point in epochs."""

    key: str
    score: float
    losses: dict[float, float | None]


@dataclass(frozen=True)
class Replayed:
    """What became of one search under a rule.

    Attributes:
        samples: trained on, over those of the whole grid.
        regret: points between the best trial of the grid and the best one that stayed.
        rank: of that one in the grid, 1 for the best.
    """

    samples: float
    regret: float
    rank: int


def run(
    device: str = "cpu", *, seeds: int = 20, num_samples: int = 240, epochs: int = 5, num_evaluation: int = 300
) -> dict[str, Any]:
    """Train a grid of HiFICL on the miniature to its end, seed by seed, and replay rules of `sweep.early_exit` over it.

    A trial has the same bits whoever is beside it, so what a rule would have stopped is known from the whole grid: the
    losses are those that the trials report at the points, the rule is the pool's own. Of a rule, `samples` is the share
    of the grid's samples that are trained on, `regret` the points of accuracy between the grid's best trial and the
    best that stayed, `rank` that one's place in the grid, all as means over the seeds; `within_a_point` is the share of
    seeds whose regret is at most 1. A rule is named by its points in epochs; half of a group stays at each.

    Args:
        device: cpu or cuda.
        seeds: searches.
        num_samples: of a trial.
        epochs: of a trial.
        num_evaluation: samples that a trial is scored on.
    """
    findings = Findings()
    points = tuple(sorted({point for after, _ in RULES.values() for point in after}))
    with one_thread(device), trials(num_samples, num_selection=100, num_evaluation=num_evaluation) as made:
        bench = Workbench(device=device)
        searches = [_searched(bench, made, seed, epochs, points) for seed in range(seeds)]
    for name, (after, keep) in RULES.items():
        replayed = [_replayed(search, after, keep, epochs) for search in searches]
        regrets = [one.regret for one in replayed]
        findings.mean(f"{name}_samples", [one.samples for one in replayed])
        findings.mean(f"{name}_regret", regrets)
        findings.mean(f"{name}_rank", [float(one.rank) for one in replayed])
        findings.mean(f"{name}_within_a_point", [float(regret <= 1) for regret in regrets])
    scores = [statistics.fmean(trial.score for trial in search) for search in searches]
    findings.mean("mean_score_of_the_grid", scores)
    findings.mean("best_score_of_the_grid", [max(trial.score for trial in search) for search in searches])
    sizes = {
        "seeds": seeds, "num_samples": num_samples, "epochs": epochs, "num_evaluation": num_evaluation,
        "learning_rates": RATES, "ranks": RANKS, "rules": RULES, "backbone": BACKBONE,
    }  # fmt: skip
    return report(findings, device=device, method=run.__doc__, sizes=sizes)


def _searched(bench: Workbench, made: Trials, seed: int, epochs: int, points: Sequence[float]) -> list[Trained]:
    """Train one seed's grid in one pack and score it."""
    requests = [
        made.request(
            "hificl", "exits", {"rank": rank}, learning_rate=rate, seed=seed, epochs=epochs, num_selection_samples=100,
            selection_metric="loss",
        )
        for rate, rank in itertools.product(RATES, RANKS)
    ]  # fmt: skip
    for request in requests:
        bench.admit(replace(request, compared_after=tuple(points)))
    while bench.advance():
        pass
    return [_trained(bench, request) for request in requests]


def _trained(bench: Workbench, request: TrialRequest) -> Trained:
    evaluation = bench.score(request, EvaluationConfig(trial=request.key, max_new_tokens=4))
    losses = {loss.after: loss.loss for loss in TrialFolder(Path(request.folder)).compared()}
    return Trained(request.key, evaluation.value or 0.0, losses)


def _replayed(search: Sequence[Trained], after: Sequence[float], keep: float, epochs: int) -> Replayed:
    """Return what a rule would have made of a search."""
    halving = Halving(after, keep, [[trial.key for trial in search]])
    there, epochs_of = list(search), dict.fromkeys((trial.key for trial in search), float(epochs))
    for point in after:
        for trial in there:
            halving.tell(trial.key, point, trial.losses[point])
        out = halving.leaving()
        epochs_of |= dict.fromkeys(out, point)
        there = [trial for trial in there if trial.key not in out]
    scores = sorted((trial.score for trial in search), reverse=True)
    best = max(trial.score for trial in there)
    samples = sum(epochs_of.values()) / (epochs * len(search))
    return Replayed(samples, scores[0] - best, 1 + sum(score > best for score in scores))


if __name__ == "__main__":
    main(run)
