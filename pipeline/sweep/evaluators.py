"""Scores trials side by side on the cluster: one Ray actor a slot, each with the backbone resident."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import ray

from pipeline.config import Params
from pipeline.measure.base import Job as Measured
from pipeline.measure.base import Measure
from pipeline.request import TrialRequest
from pipeline.sweep.tuner import cluster, count_slots
from pipeline.trial import EvaluationConfig

Job = tuple[TrialRequest, EvaluationConfig]


@ray.remote(max_restarts=0)
class Evaluator:
    """A resident process that scores one trial after another."""

    def __init__(self, batch_size: int) -> None:
        from pipeline.train.workbench import Workbench, use_threads

        use_threads()
        self.bench = Workbench(batch_size=batch_size)

    def score(self, job: Job) -> dict[str, Any]:
        """Return the record of a scored trial (without schema and run id)."""
        request, evaluation = job
        return self.bench.score(request, evaluation)

    def measure(self, kind: Measure, jobs: list[Measured]) -> list[dict[str, float]]:
        """Return what the jobs were measured as."""
        return kind.run(self.bench, jobs)


def measure_all(params: Params, kind: Measure, jobs: list[Measured]) -> list[dict[str, float]]:
    """Measure jobs in one process that has its slot for itself.

    Raises:
        HificlError: what the measure says.
    """
    sweep = params.sweep
    with cluster(sweep):
        environment = {"OMP_NUM_THREADS": str(sweep.threads_per_worker)}
        actor: Any = Evaluator
        alone = actor.options(
            num_cpus=sweep.cpus_per_worker, num_gpus=sweep.gpus_per_worker, runtime_env={"env_vars": environment}
        ).remote(params.evaluate.generation.batch_size)
        try:
            return ray.get(alone.measure.remote(kind, jobs))
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None


def score_all(params: Params, jobs: list[Job]) -> Iterator[tuple[str, Any]]:
    """Yield (evaluation key, record or exception) in the order of completion.

    A job whose process dies is tried again up to `sweep.retry.max_attempts` times.
    """
    sweep = params.sweep
    waiting = sorted(jobs, key=lambda job: (job[0].config.backbone, job[0].config.task), reverse=True)
    attempts: dict[str, int] = {}
    with cluster(sweep):
        environment = {"OMP_NUM_THREADS": str(sweep.threads_per_worker)}
        actor: Any = Evaluator
        make = actor.options(
            num_cpus=sweep.cpus_per_worker, num_gpus=sweep.gpus_per_worker, runtime_env={"env_vars": environment}
        )
        idle = [make.remote(params.evaluate.generation.batch_size) for _ in range(count_slots(sweep, 1, len(jobs)))]
        working: dict[Any, tuple[Any, Job]] = {}
        while waiting or working:
            while idle and waiting:
                actor, job = idle.pop(), waiting.pop()
                working[actor.score.remote(job)] = (actor, job)
            (ready,), _ = ray.wait(list(working))
            actor, job = working.pop(ready)
            key = job[1].key
            try:
                yield key, ray.get(ready)
                idle.append(actor)
            except ray.exceptions.RayTaskError as error:
                idle.append(actor)
                yield key, error.cause
            except ray.exceptions.RayActorError as error:
                idle.append(make.remote(params.evaluate.generation.batch_size))
                attempts[key] = attempts.get(key, 0) + 1
                if attempts[key] < sweep.retry.max_attempts:
                    waiting.append(job)
                else:
                    yield key, error
