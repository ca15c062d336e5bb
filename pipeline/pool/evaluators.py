"""Scores trials side by side on the cluster: one Ray actor a slot, each with the backbone resident.

What is answered where is planned in `evaluation_calls`; a score is made once all parts of an evaluation are there.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import ray

from pipeline.config.load import Params
from pipeline.config.schema import Sweep
from pipeline.measure import Measure, Measured, MeasureJob
from pipeline.pool.cluster import work_in
from pipeline.pool.evaluation_calls import Calls, EvaluatorCall, Job, Unit
from pipeline.pool.processes import worker_environment
from pipeline.pool.slot import KeptSlots, Scorer
from pipeline.pool.tuner import count_slots
from pipeline.records.evaluation import Evaluation

if TYPE_CHECKING:
    from pipeline.train.workbench import Workbench


@ray.remote(max_restarts=0)
class Evaluator(Scorer):
    """A resident process that answers and scores for one trial after another, where no slot is kept."""

    def __init__(self, batch_size: int, home: str, gpus: float) -> None:
        from pipeline.train.workbench import use_threads

        work_in(home)
        use_threads()
        self.batch_size, self.gpus = batch_size, gpus
        self._bench: Workbench | None = None

    @property  # a cached one has a lock in Python 3.11, which cannot be sent to an actor
    def bench(self) -> Workbench:
        """What answers; made by the first call, to which a GPU that does not work is an error as any other."""
        from pipeline.train.workbench import Workbench, device_for

        if self._bench is None:
            self._bench = Workbench(device_for(self.gpus), self.batch_size)
        return self._bench

    def ready(self) -> None:
        """Say that the process is up."""

    def measure(self, kind: Measure, jobs: list[MeasureJob]) -> list[Measured]:
        """Return what the jobs were measured as."""
        return kind.run(self.bench, jobs)


def measure_on_cluster(params: Params, kind: Measure, jobs: list[MeasureJob], kept: KeptSlots) -> list[Measured]:
    """Measure jobs on the current cluster, in a process of their own that has its slot for itself: those `kept` end.

    Raises:
        Exception: what the measure raises, or Ray where the process dies.
    """
    kept.drop()
    _, alone = _evaluator(params)
    try:
        return ray.get(alone.measure.remote(kind, jobs))
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
    finally:
        ray.kill(alone)


def _together(sweep: Sweep) -> int | Literal["auto"]:
    """Return how many adapters answer in one batch; on a CPU that gains nothing, and alone each has its own bits."""
    return sweep.pack if sweep.gpus_per_worker else 1


def score_on_cluster(params: Params, jobs: list[Job], kept: KeptSlots) -> Iterator[tuple[str, Evaluation | Exception]]:
    """Score trials on the current cluster; yield (evaluation key, evaluation or exception) in the order of completion.

    Workers of slots that are `kept` score first, for they have the backbone. What is called, made again and given up is
    decided in `evaluation_calls.Calls`.
    """
    sweep = params.sweep
    calls = Calls(jobs, count_slots(sweep, 1, sys.maxsize), _together(sweep), sweep.retry.max_attempts)
    slots = {slot.workers[0]: slot for slot in kept.take(1, calls.slots)}
    idle: list[Any] = [*slots]
    starting = dict(_evaluator(params) for _ in range(calls.slots - len(slots)))
    working: dict[Any, tuple[Any, EvaluatorCall]] = {}
    while True:
        while idle and (call := calls.take()):
            actor = idle.pop()
            working[_made(actor, call)] = (actor, call)
        if not working and (idle or not starting):
            for actor in {*idle, *starting.values()} - slots.keys():
                ray.kill(actor)  # the next work needs their processors, and someone may still refer to them
            kept.put(slots.values())
            return
        (ready,), _ = ray.wait([*working, *starting])
        if ready in starting:
            idle.append(starting.pop(ready))  # dead or alive: its first call will say
            continue
        actor, call = working.pop(ready)
        try:
            result = ray.get(ready)
        except ray.exceptions.RayTaskError as error:
            idle.append(actor)
            yield from ((key, error.cause) for key in calls.failed(call, died=False))
        except ray.exceptions.RayActorError as error:
            if actor in slots:
                slots.pop(actor).drop()
            starting |= [_evaluator(params)]
            yield from ((key, error) for key in calls.failed(call, died=True))
        else:
            idle.append(actor)
            if isinstance(call, Unit):
                calls.answered(call, result)
            else:
                yield call.job[1].key, result


def _made(actor: Any, call: EvaluatorCall) -> Any:
    """Make a call; return Ray's reference to its result."""
    if isinstance(call, Unit):
        return actor.answer.remote([request for request, _ in call.jobs], call.jobs[0][1], call.part)
    return actor.score.remote(*call.job, call.parts)


def _evaluator(params: Params) -> tuple[Any, Any]:
    """Start an evaluator in a slot; return Ray's reference to its first word, and the evaluator."""
    sweep = params.sweep
    actor: Any = Evaluator  # ray.remote makes it an actor class, which type checkers do not see
    started = actor.options(
        num_cpus=sweep.cpus_per_worker, num_gpus=sweep.gpus_per_worker,
        runtime_env={"env_vars": worker_environment(sweep)},
    ).remote(params.evaluate.generation.batch_size, str(Path.cwd()), sweep.gpus_per_worker)  # fmt: skip
    return started.ready.remote(), started
