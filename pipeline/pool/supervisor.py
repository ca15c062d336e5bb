"""Trains, scores and measures with a driver process, starts another when it or its cluster is lost, leaves none behind.

This process never imports Ray.
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config.load import Params
from pipeline.config.schema import Sweep
from pipeline.core import machine
from pipeline.core.errors import HificlError, InputError, WorkError
from pipeline.core.progress import say
from pipeline.pool import processes
from pipeline.pool.messages import (
    NO_MORE,
    PROXY_DIED,
    Alive,
    Message,
    Outcome,
    Result,
    Stop,
    Tell,
    TrialEnded,
    Watcher,
    Work,
    WorkEnded,
    WorkLost,
    WorkRefused,
)
from pipeline.pool.processes import (
    AGAIN_SECONDS,
    DRIVER_SECONDS,
    HELD_SECONDS,
    MARK,
    POLL_SECONDS,
    STARTING_SECONDS,
    STOPPING_SECONDS,
    keep_seconds,
    reap,
)
from pipeline.records.journal import Journal, sentence
from pipeline.records.store import TrialStore

if TYPE_CHECKING:  # a stage starts a driver before it imports torch
    from pipeline.measure import Measure, MeasureJob
    from pipeline.plan.plan import Plan
    from pipeline.pool.evaluation_calls import Job
    from pipeline.pool.slot import KeptSlots
    from pipeline.records.evaluation import Evaluation


@dataclass
class Training:
    """The trials `keys` of a plan, and the points that a searcher asks for; tells what becomes of them."""

    plan: Plan
    keys: list[str]
    params: Params
    store: TrialStore

    def run(self, tell: Tell, kept: KeptSlots) -> None:
        """See `Work`."""
        from pipeline.pool.evaluators import BesideTraining
        from pipeline.pool.tuner import run_trials

        beside = BesideTraining(self.plan, self.store)
        run_trials(self.plan, self.keys, self.params, tell, self.store, kept=kept, beside=beside.during)


@dataclass
class Scoring:
    """Trials to score; tells an `Outcome` by evaluation key."""

    params: Params
    jobs: Sequence[Job]

    def run(self, tell: Tell, kept: KeptSlots) -> None:
        """See `Work`."""
        from pipeline.pool.evaluators import score_on_cluster

        for key, result in score_on_cluster(self.params, list(self.jobs), kept):
            tell(Outcome(key, _sendable(result)))


@dataclass
class Measuring:
    """Groups of trials to measure; tells an `Outcome` by the group's number: what each trial was measured as."""

    params: Params
    kind: Measure
    groups: dict[int, list[MeasureJob]]

    def run(self, tell: Tell, kept: KeptSlots) -> None:
        """See `Work`."""
        from pipeline.pool.evaluators import measure_on_cluster

        for number, jobs in self.groups.items():
            try:
                tell(Outcome(number, measure_on_cluster(self.params, self.kind, jobs, kept)))
            except Exception as error:  # the other groups are measured all the same
                tell(Outcome(number, _sendable(error)))


def _sendable(result: object) -> object:
    """Return a result as it can be sent: an error of somebody's own class may not be."""
    if isinstance(result, BaseException) and not isinstance(result, HificlError):
        return WorkError(str(result) or type(result).__name__)
    return result


class Lost(Exception):
    """The driver or its cluster is gone."""


class Driver:
    """One driver process, which does one work after another; it starts its cluster while its stage imports torch.

    What Ray's C++ writes on standard error when its cluster dies, a page of addresses, is kept for `--debug`.

    Raises:
        InputError: this machine lacks what Ray needs.
    """

    def __init__(self, sweep: Sweep) -> None:
        self.mark = uuid.uuid4().hex
        self.works = False
        machine.require()
        python = machine.python()
        self.pipe, end = multiprocessing.Pipe()
        self.written = tempfile.TemporaryFile()  # noqa: SIM115 - `end` closes it
        with end:
            # in a session of its own: Ctrl-C reaches the supervisor alone, which ends it in order
            given = end.fileno(), self.written.fileno()
            self.process = subprocess.Popen(
                [python, "-m", f"{__package__}.driver", *map(str, given)], pass_fds=given,
                env={**os.environ, MARK: self.mark}, stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
        with suppress(OSError):  # its death is for `messages` to find
            self.pipe.send(sweep)

    def messages(self, work: Work) -> Iterator[Result | None]:
        """Do work; yield what it tells, and None where for a moment there is nothing.

        Raises:
            Lost: the driver or its cluster died, gave up, or gives no sign of life.
            InputError: what it says.
        """
        with suppress(OSError):  # it has ended already; why it did is read all the same
            self.pipe.send(work)
        self.works = True
        silent_at = time.monotonic() + STARTING_SECONDS
        while True:
            processes.raise_dropped_interrupt()
            try:
                message: Message | None = self.pipe.recv() if self.pipe.poll(POLL_SECONDS) else None
            except (EOFError, OSError):
                lost = Lost(f"the driver died (status {self.process.wait()})")
                self.written.seek(0)
                lost.add_note(self.written.read().decode(errors="replace"))  # for --debug
                raise lost from None
            if message is None:
                if time.monotonic() > silent_at:
                    raise Lost("the driver gives no sign of life")
                yield None
                continue
            silent_at = time.monotonic() + DRIVER_SECONDS
            match message:
                case WorkEnded():
                    return
                case WorkRefused(error):
                    raise error if isinstance(error, InputError) else Lost(str(error))
                case WorkLost(why, trace):
                    lost = Lost(why)
                    lost.add_note(trace)
                    raise lost
                case Alive():
                    yield None
                case _:
                    yield message

    def end(self) -> None:
        """End the driver and every process of its private cluster."""
        if not self.works:
            self.process.kill()  # its cluster, if it has one by now, has no work
        with suppress(OSError):
            self.pipe.send_bytes(NO_MORE)
            self.pipe.send(Stop(keep_seconds()))
        self.pipe.close()
        self.written.close()
        try:
            self.process.wait(STOPPING_SECONDS + keep_seconds())
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        reap(self.mark)


class Drivers:
    """The drivers of a command, one at a time: each does one work after another until it is lost.

    So a study's training, scoring and measuring share one cluster, and the start of one.

    Args:
        sweep: of a driver that starts now, ahead of its first work; None: one starts where there is work.
    """

    def __init__(self, sweep: Sweep | None = None) -> None:
        self._driver: Driver | None = None
        self._made_for: tuple[Sweep, Path] | None = None
        self._busy = False
        if sweep is not None:
            self.start(sweep)

    def __enter__(self) -> Drivers:
        return self

    def __exit__(self, *error: object) -> None:
        self.end()

    def start(self, sweep: Sweep) -> Driver:
        """Return the driver that there is, or another where it has other settings, another folder or a work to do.

        Raises:
            InputError: as `Driver`.
        """
        made_for = sweep, Path.cwd()
        if self._driver is None or self._busy or self._made_for != made_for:
            self.end()
            self._driver, self._made_for = Driver(sweep), made_for
        return self._driver

    def messages(self, work: Work) -> Iterator[Result | None]:
        """Do work as `Driver.messages`; a driver that does not come to the work's end is ended."""
        driver = self.start(work.params.sweep)
        self._busy = True
        try:
            yield from driver.messages(work)
        except BaseException:
            if driver is self._driver:
                self.end()
            raise
        self._busy = False

    def end(self) -> None:
        """End the driver that there is, and every process of its private cluster."""
        if self._driver is not None:
            self._driver.end()  # and again where that was interrupted
        self._driver, self._busy = None, False


class Attempts:
    """Counts and notes how often the driver of a stage was lost with nothing done in between.

    The first loss is made good at once, the others after a wait that grows: where the cluster's head is starting again,
    one driver after the other would be lost to the same cause.
    """

    def __init__(self, params: Params, stage: str, note: Callable[..., None]) -> None:
        self.count, self.most, self.stage, self.note = 0, params.sweep.retry.max_attempts, stage, note

    def lost(self, why: Lost, *, progress: bool) -> None:
        """Count and note a loss, and wait until another driver may start.

        Raises:
            WorkError: it was one too many.
        """
        self.count = 1 if progress else self.count + 1
        seconds, given_up = AGAIN_SECONDS * (self.count - 1), self.count >= self.most
        wait = {"next_after": f"{seconds:.0f} s"} if seconds and not given_up else {}
        self.note(f"the driver of stage {self.stage} is lost", why=str(why), attempt=self.count, **wait)
        if given_up:
            way_out = "What had finished is kept; mend the cause and run the same command again"
            raise WorkError(f"gave up after {self.count} attempts: {why}", where=self.stage, way_out=way_out) from why
        time.sleep(seconds)  # a signal ends it


def train(
    plan: Plan, todo: list[str], params: Params, store: TrialStore, watchers: Sequence[Watcher], drivers: Drivers,
    *, adaptive: bool,
) -> dict[str, str]:  # fmt: skip
    """Train the trials `todo`, and those that an adaptive searcher asks for, with as many drivers as that takes.

    Returns:
        The errors of trials that failed, by key; most stand in the trial store too. A point that a searcher asked for
        and that has no end counts as one.

    Raises:
        InputError: as the driver's.
        Displaced: another sweep has taken the store over.
        WorkError: the driver was lost `sweep.retry.max_attempts` times, with no epoch in between.
    """
    journal = Journal(store.root)
    attempts = Attempts(params, "train", journal.note)
    for key in todo:
        store.reopen(key)  # from here on an end is this sweep's
    keys, told, errors, check_at = set(todo), set[str](), dict[str, str](), 0.0
    behind = _progress(store, keys)
    while todo or adaptive:
        lost = Lost("its process died")
        ends: dict[str, str | None] = {}  # of the trials whose end it has told of
        unwritten = set[str]()  # stopped by the scheduler, or nobody waits for them any more: the store will say
        try:
            for message in drivers.messages(Training(plan, todo, params, store)):
                if time.monotonic() >= check_at:
                    store.check_held()
                    check_at = time.monotonic() + HELD_SECONDS
                for event in journal.news():
                    for watcher in watchers:
                        watcher.on_event(event)
                if unwritten:
                    told_now = _tell(store, unwritten, watchers)
                    ends |= dict.fromkeys(told_now)
                    unwritten -= told_now
                if message is None or isinstance(message, Outcome):
                    continue
                keys.add(message.key)  # those that a searcher asked for included
                if isinstance(message, TrialEnded):
                    if message.error == PROXY_DIED or (message.error is None and store.done(message.key) is None):
                        unwritten.add(message.key)
                        continue
                    ends[message.key] = message.error
                for watcher in watchers:
                    watcher.hear(message)
            adaptive = False
        except Lost as error:
            lost = error
        errors |= {key: error for key, error in ends.items() if error is not None}
        told |= ends.keys()
        told |= _tell(store, keys - told, watchers)
        if not told.issuperset(todo):
            drivers.end()  # from here on nobody of it writes
            told |= _tell(store, keys - told, watchers)
        # by what was told and not by another look, which may find an end that nobody was told of; a trial that failed
        # has its end too, unless the disk is full; one without lost its way, not its state
        todo = [key for key in todo if key not in told]
        if not todo and not adaptive:
            break
        now = _progress(store, keys)
        attempts.lost(lost, progress=now > behind)
        behind = now
    return errors | dict.fromkeys(sorted(keys - told), PROXY_DIED)


def _tell(store: TrialStore, keys: set[str], watchers: Sequence[Watcher]) -> set[str]:
    """Tell the watchers of ends that stand in the store and that died with the driver before it could say so."""
    ends = {key: end for key in sorted(keys) if (end := store.done(key)) is not None}
    for key, end in ends.items():
        for watcher in watchers:
            watcher.on_end(key, end.error)
    return set(ends)


def _progress(store: TrialStore, keys: set[str]) -> tuple[int, int]:
    """Return how many of some trials have ended, and the epochs of the others."""
    going = [key for key in keys if store.done(key) is None]
    return len(keys) - len(going), sum(len(store.epochs(key)) for key in going)


def score_all(params: Params, jobs: Sequence[Job], drivers: Drivers) -> Iterator[tuple[str, Evaluation | Exception]]:
    """Yield (evaluation key, evaluation or error) in the order of completion.

    Raises:
        InputError: as the driver's.
        WorkError: the driver was lost `sweep.retry.max_attempts` times, with no score in between.
    """

    def left(done: set[Any]) -> Work | None:
        rest = [job for job in jobs if job[1].key not in done]
        return Scoring(params, rest) if rest else None

    yield from _answers(left, params, drivers)


def measure_all(
    params: Params, kind: Measure, groups: Sequence[list[MeasureJob]], drivers: Drivers
) -> Iterator[tuple[int, Any]]:
    """Yield (number of the group, what each of its trials was measured as, or error).

    Raises:
        InputError, WorkError: as `score_all`.
    """

    def left(done: set[Any]) -> Work | None:
        rest = {number: jobs for number, jobs in enumerate(groups) if number not in done}
        return Measuring(params, kind, rest) if rest else None

    yield from _answers(left, params, drivers)


def _answers(left: Callable[[set[Any]], Work | None], params: Params, drivers: Drivers) -> Iterator[tuple[Any, Any]]:
    """Yield what the work that is `left` when these keys are done tells of each of its keys."""
    done: set[Any] = set()
    attempts = Attempts(params, "evaluate", _note)
    while (work := left(done)) is not None:
        before, lost = len(done), Lost("it ended before its work")
        try:
            for message in drivers.messages(work):
                if isinstance(message, Outcome):
                    done.add(message.key)
                    yield message.key, message.result
        except Lost as error:
            lost = error
        if left(done) is not None:
            drivers.end()
            attempts.lost(lost, progress=len(done) > before)


def _note(event: str, **facts: Any) -> None:
    say(sentence(event, facts))
