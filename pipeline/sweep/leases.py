"""Open trials trained by processes that take them from the store one after another: no head, no Ray, no MLflow.

A process leases a trial (`TrialStore.lease`), trains it as a slot does, and lets it go. Any number do so side by side,
on one machine or on many that see one store, whoever starts them (`hificl submit slurm`). MLflow is brought in line by
the next `hificl sweep`, which finds the trials done.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.config.load import Params
from pipeline.core.errors import InputError
from pipeline.core.files import Superseded
from pipeline.core.progress import say
from pipeline.plan.plan import Places, Plan, all_cells, make_plan, places
from pipeline.plan.space import Cell
from pipeline.pool.processes import ENDING, KEEPING
from pipeline.records.journal import Journal
from pipeline.records.store import TrialStore
from pipeline.records.trial import Attempts, Provenance, TrialEnd
from pipeline.sweep.train import check_open_engines
from pipeline.tracking.provenance import provenance
from pipeline.train import checkpoint
from pipeline.train.workbench import Stopped, Workbench, device_for, join_group, use_threads

SIGNALS = (KEEPING, *ENDING)


class Broken(Exception):
    """A trial failed in a way that may have broken this process; a new one tries it again."""


@dataclass
class Worked:
    """What a process has done.

    Attributes:
        failed: why trials failed, by key.
        held: how many open trials others hold.
        signal: that ended it; the last step is kept.
    """

    failed: dict[str, str] = field(default_factory=dict)
    held: int = 0
    signal: int | None = None


def leasable(params: Params, cells: Iterable[Cell], folders: Places) -> Plan:
    """Return the plan of cells whose trials can be trained without a head, as far as the store tells what they are.

    Raises:
        InputError: something in it needs one, or what a cell asks for cannot be had.
    """
    plan = make_plan(params, cells, folders, TrialStore(folders.runs).objective)
    ranks = max((config.world_size for config in plan.trials.values() if config.trained), default=1)
    needs = {
        "sweep.search: optuna": "asks for its points one after another" if plan.searched else None,
        f"sweep.scheduler: {params.sweep.scheduler}": (
            "compares trials while they train" if params.sweep.scheduler != "fifo" else None
        ),
        f"train.world_size: {ranks}": "makes a trial of several processes" if ranks > 1 else None,
    }
    for setting, why in needs.items():
        if why is not None:
            way_out = "`hificl submit slurm --nodes N` has one, and so has `hificl sweep`"
            raise InputError(f"{why}, which needs a head", where=setting, way_out=way_out)
    return plan


def open_again(plan: Plan, store: TrialStore) -> list[str]:
    """Take back the ends of trials that failed or were stopped; return all that are open."""
    todo = plan.open_keys(store.settled)
    for key in todo:
        if store.done(key) is not None:
            store.reopen(key)
            store.note_tried(key, None)
    return todo


def work(params: Params, studies: list[str], root: Path | None = None) -> Worked:
    """Lease and train open trials until each has ended or is another process's, or a signal comes.

    Raises:
        InputError: as `leasable`; params, data, weights or the GPU are not in order; or a sweep holds the store.
        Broken: the process has to begin anew.
    """
    worker = _Worker(params)
    with worker.listening():
        folders = places(root)
        cells, origin = all_cells(params, studies, folders), provenance(folders.runs.parent)
        known: set[str] = set()
        while worker.goes_on and not (plan := leasable(params, cells, folders)).trials.keys() <= known:
            worker.run(plan, origin)
            known |= plan.trials.keys()  # what they came out as may ask for more (a budget that widens)
    return worker.worked


class _Worker:
    """One process that leases trials."""

    def __init__(self, params: Params) -> None:
        self.params, self.worked = params, Worked()
        self.bench: Workbench | None = None
        self.training = False  # whether a signal is heard by the workbench, behind its next step
        self.over: set[str] = set()  # trials that have ended, or that another process took up from this one

    @property
    def goes_on(self) -> bool:
        """Whether neither a signal nor trials that others hold tell this process to end."""
        return self.worked.signal is None and not self.worked.held

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Let signals end the block: training behind its next step, all else at once."""

        def hear(number: int, *_: Any) -> None:
            first, self.worked.signal = self.worked.signal is None, number
            if self.bench is not None:
                self.bench.stopping = True
            if first and not self.training:
                raise Stopped

        heard = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]  # as nohup leaves it
        before = {number: signal.signal(number, hear) for number in heard}
        try:
            yield
        except Stopped:
            say(f"{signal.Signals(self.worked.signal or 0).name}: the last step is kept")
        finally:
            if self.worked.signal is None:  # else who ends hears no second one
                for number, handler in before.items():
                    signal.signal(number, handler)

    def run(self, plan: Plan, origin: Provenance) -> None:
        """Train what is open."""
        store = TrialStore(plan.places.runs)
        check_open_engines(plan, store)
        while self.worked.signal is None and self._next(plan, store, origin):
            pass
        self.worked.held = len(plan.open_keys(lambda key: store.done(key) is not None))

    def _next(self, plan: Plan, store: TrialStore, origin: Provenance) -> bool:
        """Train an open trial that nobody holds; return whether there was one."""
        for key in plan.open_keys(self.over.__contains__):
            if store.done(key) is None and not store.halted(key):
                bench = self._bench()  # a GPU that does not work is no trial's fault
                with store.lease(key, "a process that trains leased trials") as free:
                    if free and store.done(key) is None:
                        self._try(plan, store, key, origin, bench)
                        return True
                    if not free:
                        continue
            self.over.add(key)
        return False

    def _bench(self) -> Workbench:
        if self.bench is None:
            use_threads()
            device = device_for(self.params.sweep.gpus_per_worker)
            join_group(device, 0, 1)
            self.bench = Workbench(device)
        return self.bench

    def _try(self, plan: Plan, store: TrialStore, key: str, origin: Provenance, bench: Workbench) -> None:
        newest = max((path.name for path in store.trial(key).checkpoint.glob("epoch-*")), default="")
        before = store.tried(key)
        count = before.attempts if before.at == newest else 0
        if count >= self.params.sweep.retry.max_attempts:
            self._fail(store, key, before.error or "its process was killed, again and again", count)
            return
        this = Attempts(attempts=count + 1, at=newest, error=before.error)
        try:
            store.note_tried(key, this)
            self._train(plan, store, key, origin, bench)
            store.note_tried(key, None)
        except Stopped:
            store.note_tried(key, None)
            raise
        except Superseded as error:
            self.over.add(key)
            say(str(error))
        except InputError as error:
            self._fail(store, key, str(error), this.attempts)
        except Exception as error:
            why = f"{type(error).__name__}: {error}"
            store.note_tried(key, this.model_copy(update={"error": why}))
            Journal(store.root).note("trial lost", trial=key, why=why, attempt=this.attempts)
            raise Broken(why) from error
        finally:
            self.training = False
            bench.evict(key)

    def _train(self, plan: Plan, store: TrialStore, key: str, origin: Provenance, bench: Workbench) -> None:
        config = plan.trials[key]
        store.open(config, origin)
        behind = bench.admit(plan.request_of(config))
        who = f"pid {os.getpid()} on {os.uname().nodename}"
        Journal(store.root).note("trial leased", trial=key, after_epoch=behind, by=who)
        say(f"{key}: {config.name}, {behind} of {config.epochs} epochs are done")
        self.training, end = True, None
        if self.worked.signal is not None:  # whose exception Python has dropped, as in a finaliser
            bench.stopping = True
        while end is None and not store.halted(key):
            for report in bench.advance():
                end, behind = report.end, report.epoch
                say(f"{key}: epoch {report.epoch}{f', {end}' if end else ''}")
        if end is None:
            store.finish(key, checkpoint.stopped(store.trial(key).checkpoint))
            say(f"{key}: stopped by hand after epoch {behind}")

    def _fail(self, store: TrialStore, key: str, why: str, attempts: int) -> None:
        store.finish(key, TrialEnd(status="failed", error=why, attempts=attempts))
        store.note_tried(key, None)
        Journal(store.root).note("trial failed", trial=key, why=why, attempts=attempts)
        self.worked.failed[key] = why
