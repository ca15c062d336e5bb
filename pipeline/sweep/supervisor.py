"""Runs the sweep's driver process, starts another when it or its cluster is lost, and leaves no process behind."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import time
import uuid
from contextlib import suppress
from typing import Any

from pipeline.config import Params
from pipeline.errors import InputError, WorkError
from pipeline.sweep import signals
from pipeline.sweep.driver import MARK, PROXY_DIED, STOP, reap
from pipeline.sweep.journal import Journal
from pipeline.sweep.limits import DRIVER_SECONDS, POLL_SECONDS, STARTING_SECONDS, STOPPING_SECONDS
from pipeline.sweep.plan import Plan
from pipeline.sweep.store import TrialStore


class Lost(Exception):
    """The driver or its cluster is gone."""


class Driver:
    """One driver process; it imports Ray while its supervisor opens MLflow."""

    def __init__(self) -> None:
        self.mark = uuid.uuid4().hex
        self.works = False
        self.seen: set[str] = set()  # trials that it took up, those that a searcher asked for included
        self.ends: dict[str, str | None] = {}  # the error, if any, of each trial whose end it has told of
        self.pipe, theirs = multiprocessing.Pipe()
        with theirs:
            # in a session of its own: Ctrl-C reaches the supervisor alone, which ends it in order
            self.process = subprocess.Popen(
                [sys.executable, "-m", "pipeline.sweep.driver", str(theirs.fileno())], pass_fds=[theirs.fileno()],
                env={**os.environ, MARK: self.mark}, stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip

    def run(self, plan: Plan, keys: list[str], params: Params, watchers: list[Any], journal: Journal) -> None:
        """Train the trials `keys`; see `tuner.run_trials`.

        Raises:
            Lost: the driver or its cluster died, gave up, or gives no sign of life.
            InputError: what it says.
        """
        try:
            self.pipe.send((plan, keys, params))
        except OSError:
            raise Lost("the driver died at its start") from None
        self.works = True
        silent_at = time.monotonic() + STARTING_SECONDS
        while True:
            signals.check()
            try:
                news = self.pipe.poll(POLL_SECONDS)
                message = self.pipe.recv() if news else None
            except (EOFError, OSError):
                raise Lost(f"the driver died (status {self.process.wait()})") from None
            for row in journal.news():
                for watcher in watchers:
                    if hasattr(watcher, "on_event"):
                        watcher.on_event(row)
            if message is None:
                if time.monotonic() > silent_at:
                    raise Lost("the driver gives no sign of life")
                continue
            silent_at = time.monotonic() + DRIVER_SECONDS
            what, *facts = message
            if what == "ended":
                return
            if what == "error" and isinstance(facts[0], InputError):
                raise facts[0]
            if what in ("error", "lost"):
                raise Lost(str(facts[0]))
            if what == "on_end" and facts[1] != PROXY_DIED:
                self.ends[facts[0]] = facts[1]
            if what != "alive":
                self.seen.add(facts[0])
                for watcher in watchers:
                    getattr(watcher, what)(*facts)

    def end(self) -> None:
        """End the driver and every process of its private cluster."""
        if not self.works:
            self.process.kill()  # it has only imported so far
        with suppress(OSError):
            self.pipe.send(STOP)
        self.pipe.close()
        try:
            self.process.wait(STOPPING_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        reap(self.mark)


def train(
    plan: Plan, todo: list[str], params: Params, watchers: list[Any], first: Driver | None, *, adaptive: bool
) -> dict[str, str]:
    """Train the trials `todo` until each has an end, with as many drivers as that takes.

    Args:
        plan: of the sweep.
        todo: keys of the trials.
        params: the project's.
        watchers: who hears what happens; see `tuner.Watcher`.
        first: a driver that was started beforehand.
        adaptive: whether a searcher asks for further trials.

    Returns:
        The errors of trials that failed, by key; most stand in the trial store too.

    Raises:
        InputError: as the driver's.
        WorkError: the driver was lost `sweep.retry.max_attempts` times, with no epoch in between.
    """
    store, journal = TrialStore(plan.places.runs), Journal(plan.places.runs)
    most, attempts = params.sweep.retry.max_attempts, 0
    for key in todo:
        store.reopen(key)  # from here on an end is this sweep's
    mine, told, errors = set(todo), set[str](), dict[str, str]()
    behind = _progress(store, mine)
    while todo or adaptive:
        driver, first = first or Driver(), None
        why = "its process died"
        try:
            driver.run(plan, todo, params, watchers, journal)
            adaptive = False
        except Lost as lost:
            why = str(lost)
        finally:
            driver.end()
        errors |= {key: error for key, error in driver.ends.items() if error is not None}
        mine |= driver.seen
        told |= driver.ends.keys()
        told |= _tell(store, mine - told, watchers)
        # a trial that failed has its end too, unless the disk is full; one without lost its way, not its state
        todo = [key for key in todo if store.done(key) is None and key not in errors]
        if not todo and not adaptive:
            break
        now = _progress(store, mine)
        attempts = 1 if now > behind else attempts + 1
        behind = now
        journal.note("the sweep's driver is lost", why=why, attempt=attempts)
        if attempts >= most:
            raise WorkError(
                f"gave up after {attempts} attempts: {why}", where="train",
                way_out="Finished trials and epochs are kept; mend the cause and run the same command again",
            )  # fmt: skip
    return errors


def _tell(store: TrialStore, keys: set[str], watchers: list[Any]) -> set[str]:
    """Tell the watchers of ends that stand in the store and that died with the driver before it could say so."""
    ends = {key: done for key in sorted(keys) if (done := store.done(key)) is not None}
    for key, done in ends.items():
        for watcher in watchers:
            watcher.on_end(key, done.get("error"))
    return set(ends)


def _progress(store: TrialStore, keys: set[str]) -> int:
    """Return the epochs and ends that the store holds of some trials."""
    return sum(len(store.epochs(key)) + (store.done(key) is not None) for key in keys)
