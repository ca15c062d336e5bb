"""Scores trials side by side on the cluster: one Ray actor a slot, each with the backbone resident.

What is answered where is planned in `units`; a score is made where all parts of an evaluation have come together.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray

from pipeline.config import Params
from pipeline.measure.base import Job as Measured
from pipeline.measure.base import Measure
from pipeline.request import TrialRequest
from pipeline.sweep.nodes import work_in
from pipeline.sweep.tuner import count_slots
from pipeline.sweep.units import Complete, Job, Ledger, Unit, split, units
from pipeline.train.scoring import Answers, Part
from pipeline.trial import EvaluationConfig


@ray.remote(max_restarts=0)
class Evaluator:
    """A resident process that answers and scores for one trial after another."""

    def __init__(self, batch_size: int, home: str) -> None:
        from pipeline.train.workbench import Workbench, use_threads

        work_in(home)
        use_threads()
        self.bench = Workbench(batch_size=batch_size)

    def answer(self, requests: list[TrialRequest], evaluation: EvaluationConfig, part: Part) -> list[Answers]:
        """Return trials' answers to one part of their split."""
        return self.bench.answer(requests, evaluation, part)

    def score(self, request: TrialRequest, evaluation: EvaluationConfig, parts: list[Answers]) -> dict[str, Any]:
        """Return the record of a trial that has answered (without schema and run id)."""
        return self.bench.finish(request, evaluation, parts)

    def measure(self, kind: Measure, jobs: list[Measured]) -> list[dict[str, float]]:
        """Return what the jobs were measured as."""
        return kind.run(self.bench, jobs)


def measure(params: Params, kind: Measure, jobs: list[Measured]) -> list[dict[str, float]]:
    """Measure jobs on the current cluster, in a process of their own that has its slot for itself.

    Raises:
        Exception: what the measure raises, or Ray where the process dies.
    """
    alone = _evaluator(params)
    try:
        return ray.get(alone.measure.remote(kind, jobs))
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
    finally:
        ray.kill(alone)


def score_all(params: Params, jobs: list[Job]) -> Iterator[tuple[str, Any]]:
    """Score trials on the current cluster; yield (evaluation key, record or exception) in the order of completion.

    A call whose process dies is made again up to `sweep.retry.max_attempts` times. Where one of several trials that
    answer together is in the way, they answer one by one.
    """
    yield from _Scoring(params, jobs).run()


def _evaluator(params: Params) -> Any:
    """Start an evaluator in a slot."""
    sweep = params.sweep
    actor: Any = Evaluator  # ray.remote makes it an actor class, which type checkers do not see
    environment = {"OMP_NUM_THREADS": str(sweep.threads_per_worker)}
    return actor.options(
        num_cpus=sweep.cpus_per_worker, num_gpus=sweep.gpus_per_worker, runtime_env={"env_vars": environment}
    ).remote(params.evaluate.generation.batch_size, str(Path.cwd()))


class _Scoring:
    """The evaluators of one stage, and what is left for them to do."""

    def __init__(self, params: Params, jobs: list[Job]) -> None:
        self.params, sweep = params, params.sweep
        slots = count_slots(sweep, 1, sys.maxsize)
        waiting = units(jobs, slots, sweep.pack)
        self.ledger = Ledger()
        self.ledger.expect(waiting)
        self.waiting: list[Unit | Complete] = list(reversed(waiting))
        self.attempts: Counter[Any] = Counter()  # by the key of the call
        self.idle = [_evaluator(params) for _ in range(min(slots, len(waiting)))]
        self.working: dict[Any, tuple[Any, Unit | Complete]] = {}

    def run(self) -> Iterator[tuple[str, Any]]:
        """Yield what comes to an end."""
        while self.waiting or self.working:
            while self.idle and self.waiting:
                self._give(self.idle.pop(), self.waiting.pop())
            (ready,), _ = ray.wait(list(self.working))
            actor, work = self.working.pop(ready)
            try:
                result = ray.get(ready)
                self.idle.append(actor)
            except ray.exceptions.RayTaskError as error:
                self.idle.append(actor)
                yield from self._failed(work, error.cause, again=len(work.jobs) > 1)
                continue
            except ray.exceptions.RayActorError as error:
                self.idle.append(_evaluator(self.params))
                self.attempts[work.key] += 1
                yield from self._failed(
                    work, error, again=self.attempts[work.key] < self.params.sweep.retry.max_attempts
                )
                continue
            if isinstance(work, Unit):
                self.waiting.extend(self.ledger.put(work, result))
            else:
                yield work.job[1].key, result

    def _give(self, actor: Any, work: Unit | Complete) -> None:
        if isinstance(work, Unit):
            requests = [request for request, _ in work.jobs]
            call = actor.answer.remote(requests, work.jobs[0][1], work.part)
        else:
            call = actor.score.remote(*work.job, work.parts)
        self.working[call] = (actor, work)

    def _failed(self, work: Unit | Complete, error: Any, *, again: bool) -> Iterator[tuple[str, Any]]:
        """Put work back, in smaller pieces where it has any; or yield the error of its evaluations."""
        if again:
            self.waiting.extend(split(work))
            return
        for _, evaluation in work.jobs:
            if self.ledger.give_up(evaluation.key):
                yield evaluation.key, error
