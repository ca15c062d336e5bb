"""Scores trials side by side on the cluster: one Ray actor a slot, each with the backbone resident.

What is answered where is planned in `evaluation_calls`; a score is made once all parts of an evaluation are there.
Some scores are made while other trials still train, in slots that have nothing to train (`BesideTraining`).
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import ray

from pipeline.config.load import Params
from pipeline.config.schema import Sweep
from pipeline.config.trial import KEY_LENGTH, digest
from pipeline.core.errors import HificlError
from pipeline.core.files import folder_digest, remove_file, remove_folder
from pipeline.core.progress import say
from pipeline.measure import Measure, Measured, MeasureJob
from pipeline.plan.plan import Plan, candidates, choose, evaluation_of
from pipeline.pool.cluster import code_version, work_in
from pipeline.pool.evaluation_calls import Calls, EvaluatorCall, Job, Unit
from pipeline.pool.processes import worker_environment
from pipeline.pool.slot import CalledOff, KeptSlots, Lent, Scorer
from pipeline.pool.tuner import count_slots
from pipeline.records.evaluation import Evaluation, Evaluations
from pipeline.records.journal import Journal
from pipeline.records.store import TrialStore

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

    What was scored beside training comes first.
    """
    missing = []
    for job in jobs:
        score = _made_beside(job)
        if score is None:
            missing.append(job)
        else:
            yield job[1].key, score
    if len(missing) < len(jobs):
        say(f"{len(jobs) - len(missing)} of {len(jobs)} trials were scored while others trained")
    yield from _scored(params, missing, kept)


def _scored(params: Params, jobs: list[Job], kept: KeptSlots) -> Iterator[tuple[str, Evaluation | Exception]]:
    """Score trials; workers of slots that are `kept` score first, for they have the backbone.

    What is called, made again and given up is decided in `evaluation_calls.Calls`.
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


def _made(actor: Any, call: EvaluatorCall, lending: int = 0) -> Any:
    """Make a call; return Ray's reference to its result."""
    if isinstance(call, Unit):
        return actor.answer.remote([request for request, _ in call.jobs], call.jobs[0][1], call.part, lending)
    return actor.score.remote(*call.job, call.parts)


class BesideTraining:
    """Scores trials of a plan while others train, in slots that have nothing to train: in a thread of the driver.

    A score waits in cache/scores/ until it is asked for, and is used where neither the code nor the adapter is another
    by then. Nothing hangs on it: what is missing there is scored in its turn.

    Args:
        plan: the sweep's.
        store: as the sweep holds it.
    """

    def __init__(self, plan: Plan, store: TrialStore) -> None:
        self.plan, self.store = plan, store
        sweep = plan.params.sweep
        self._calls = Calls([], count_slots(sweep, 1, sys.maxsize), _together(sweep), sweep.retry.max_attempts)
        self._open: dict[str, list[str]] | None = None  # cells that are not scored, with their candidates' keys

    @contextmanager
    def during(self, dispatcher: Any) -> Iterator[None]:
        """Score while the dispatcher's slots train."""
        thread = threading.Thread(target=self._run, args=(dispatcher,), daemon=True, name="scores beside training")
        thread.start()
        yield  # where that raises, the driver ends, and the thread with it
        ray.get(dispatcher.end_lending.remote())
        thread.join(self.plan.params.sweep.retry.hang_seconds)  # who has not come back by then is ended

    def _run(self, dispatcher: Any) -> None:
        with suppress(ray.exceptions.RayError):  # the dispatcher or its cluster is gone, and the driver with it
            self._score(dispatcher)

    def _score(self, dispatcher: Any) -> None:
        working: dict[Any, tuple[Lent, EvaluatorCall]] = {}
        coming = [dispatcher.lend.remote(-1)]
        while coming or working:
            (ready,), _ = ray.wait([*coming, *working])
            if ready in working:
                lent, call = working.pop(ready)
                following, why_lost = self._after(call, ready)
            else:
                lent, coming = ray.get(ready), []
                if lent is None:  # the sweep is over
                    continue
                following, why_lost = self._next(), ""
                coming = [dispatcher.lend.remote(-1 if following else lent.ended)]
            if following is not None:
                working[_made(lent.worker, following, lent.number)] = lent, following
            else:
                ray.get(dispatcher.take_back.remote(lent.number, why_lost))

    def _after(self, call: EvaluatorCall, made: Any) -> tuple[EvaluatorCall | None, str]:
        """Take in what a call came to; return the next one for its slot, or None and why the slot is lost, if it is."""
        try:
            result = ray.get(made)
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, CalledOff):
                self._calls.put_back(call)
                return None, ""
            self._calls.failed(call, died=False)  # which the stage that scores finds too, and says
        except ray.exceptions.RayActorError as error:
            self._calls.failed(call, died=True)
            return None, str(error).splitlines()[0]
        else:
            if isinstance(call, Unit):
                self._calls.answered(call, result)
            else:
                with self._noted():
                    _keep_beside(call.job, result)
        return self._next(), ""

    def _next(self) -> EvaluatorCall | None:
        call = self._calls.take()
        if call is None:
            with self._noted():
                self._calls.add(self._ready())
            call = self._calls.take()
        return call

    @contextmanager
    def _noted(self) -> Iterator[None]:
        """Say what keeps a score from being made or kept now; it is made in its turn."""
        try:
            yield
        except (HificlError, OSError) as error:
            Journal(self.store.root).note("no score beside training", why=str(error))

    def _ready(self) -> list[Job]:
        """Return the scores that the cells need whose candidates have all ended since the last look."""
        params, scored = self.plan.params, Evaluations(self.plan.places.runs.parent / "evaluations")
        if self._open is None:
            asked_later = {cell.name for cell in self.plan.searched}
            self._open = {
                cell.name: [config.key for _, config in candidates(params, cell, self.store)]
                for cell in self.plan.cells.values()
                if cell.name not in asked_later
            }
        jobs: dict[str, Job] = {}
        for name in [name for name, keys in self._open.items() if all(map(self.store.done, keys))]:
            cell = self.plan.cells[name]
            choice = choose(params, cell, self.store)
            if any(row.status == "missing" for row in choice.candidates):  # that its study's `widen` has added
                continue
            del self._open[name]
            if choice.trial is None:
                continue
            evaluation = evaluation_of(params, cell, choice.trial)
            if not scored.path(evaluation.key).exists():
                jobs[evaluation.key] = self.plan.request_of(self.store.config(choice.trial), evaluation), evaluation
        return [job for job in jobs.values() if not _scores_beside(job).path(job[1].key).exists()]


def _scores_beside(job: Job) -> Evaluations:
    """Return where this code keeps the scores of a trial's store that it makes beside training."""
    return Evaluations(Path(job[0].folder).parent.parent / "cache/scores" / _code())


@cache
def _code() -> str:
    return digest(code_version())[:KEY_LENGTH]


def _keep_beside(job: Job, score: Evaluation) -> None:
    scores, adapter = _scores_beside(job), Path(job[0].folder) / "adapter"
    for folder in scores.root.parent.glob("*"):
        if folder != scores.root:  # of other code
            remove_folder(folder)
    scores.write(job[1].key, score.model_copy(update={"adapter_digest": folder_digest(adapter)}))


def _made_beside(job: Job) -> Evaluation | None:
    """Return a score that was made beside training, once; None where there is none, or not of what there is now."""
    scores, key, score = _scores_beside(job), job[1].key, None
    with suppress(HificlError):  # a damaged one
        score = scores.find(key)
    remove_file(scores.path(key))
    if score is None or score.adapter_digest != folder_digest(Path(job[0].folder) / "adapter"):
        return None
    return score


def _evaluator(params: Params) -> tuple[Any, Any]:
    """Start an evaluator in a slot; return Ray's reference to its first word, and the evaluator."""
    sweep = params.sweep
    actor: Any = Evaluator  # ray.remote makes it an actor class, which type checkers do not see
    started = actor.options(
        num_cpus=sweep.cpus_per_worker, num_gpus=sweep.gpus_per_worker,
        runtime_env={"env_vars": worker_environment(sweep)},
    ).remote(params.evaluate.generation.batch_size, str(Path.cwd()), sweep.gpus_per_worker)  # fmt: skip
    return started.ready.remote(), started
