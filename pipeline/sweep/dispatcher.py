"""The queue in front of the resident pool: which slot trains which trials, and what becomes of their reports.

Ray Tune decides which trials live; its actors (`sweep.proxy`) hand their trial to this actor and wait for reports. A
slot (`sweep.slot`) trains one trial, or several that share forward passes. A worker that dies, hangs or is killed costs
its slot a rebuild and its trials the time since the last epoch's checkpoint; they are the next that a free slot takes.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import ray

from pipeline.config import Sweep
from pipeline.errors import HificlError, InputError, WorkError
from pipeline.request import TrialRequest
from pipeline.sweep.journal import Journal
from pipeline.sweep.slot import Slot, SlotLost
from pipeline.sweep.store import FINAL, TrialStore

Resolve = Callable[[dict[str, Any]], TrialRequest]
Report = dict[str, Any]  # one epoch's metrics with "epoch", "trial_key" and "done"; or {"error": ...}


@dataclass(eq=False)
class _Trial:
    request: TrialRequest
    reports: list[Report] = field(default_factory=list)
    news: asyncio.Event = field(default_factory=asyncio.Event)
    allowed: int = 1  # epochs the scheduler has asked for so far
    attempts: int = 0  # failures since its last epoch
    lost_at: float | None = None  # when its last slot was lost
    stopped: bool = False
    ended: bool = False
    alone: bool = False  # after a pack of it failed: whose fault it was shows when each trains alone

    @property
    def packable(self) -> bool:
        """Whether it may share a slot with others."""
        return self.request.pack_key is not None and not self.alone

    def deliver(self, report: Report) -> None:
        self.reports.append(report)
        self.attempts = 0
        self.ended = self.ended or bool(report.get("done") or "error" in report)
        self.news.set()


@ray.remote(num_cpus=0, max_concurrency=10000)
class Dispatcher:
    """Hands trials to slots and their reports back.

    Args:
        resolve: gives the request of a trial from Tune's configuration of it. It is pickled to this actor: a plain
            table of requests for grid and random search, so that neither torch nor transformers is imported here.
        sweep: resources and retry policy.
        store_root: the trial store, absolute.
        slots: how many slots.
        world_size: ranks of a slot.
        run_ahead: whether a trial goes on before the scheduler has seen its last epoch (right for FIFO alone).
        home: the project's folder, in which workers find images by relative paths.
    """

    def __init__(
        self, resolve: Resolve, sweep: Sweep, store_root: str, slots: int, world_size: int, run_ahead: bool, home: str
    ) -> None:
        self.resolve, self.sweep, self.run_ahead = resolve, sweep, run_ahead
        self.store, self.journal = TrialStore(store_root), Journal(store_root)
        self.trials: dict[str, _Trial] = {}
        self.queue: list[_Trial] = []
        self.queued = asyncio.Event()
        self.slots = [Slot(sweep, world_size, home) for _ in range(slots)]
        self.loops: list[asyncio.Task] = []
        self.failure: str | None = None

    async def start(self) -> None:
        """Build the slots; returns at once, the queue is served as slots come up."""
        self.loops = [asyncio.ensure_future(self._serve(slot)) for slot in self.slots]

    async def submit(self, tune_config: dict[str, Any]) -> str:
        """Queue a trial and return its key; one that the ledger knows as done is replayed from it."""
        request = self.resolve(tune_config)
        trial = self.trials.get(request.key)
        if trial is not None and not trial.ended:
            return request.key
        self.store.open(request.config, {})
        trial = self.trials[request.key] = _Trial(request)
        done = self.store.done(request.key)
        if done is not None and done["status"] in FINAL:
            rows = self.store.epochs(request.key)
            for row in rows:
                trial.deliver({**row, "trial_key": request.key, "done": row is rows[-1]})
            if not rows:
                trial.deliver({"epoch": 0, "trial_key": request.key, "done": True})
            return request.key
        self.store.reopen(request.key)
        self._enqueue(trial)
        return request.key

    async def next(self, key: str, seen: int) -> Report:
        """Wait for report number `seen` (0-based) of a trial; asking for it allows that epoch to be trained."""
        trial = self.trials[key]
        trial.allowed = max(trial.allowed, seen + 1)
        while len(trial.reports) <= seen:
            trial.news.clear()
            await trial.news.wait()
        return trial.reports[seen]

    async def stop(self, key: str) -> None:
        """Stop a trial; what it has learned stays in its checkpoint."""
        trial = self.trials.get(key)
        if trial is None or trial.ended:
            return
        trial.stopped = True
        trial.news.set()

    async def pids(self) -> list[list[int]]:
        """Return the process ids of every slot's workers."""
        return [slot.pids for slot in self.slots]

    async def close(self) -> None:
        """End all workers."""
        for loop in self.loops:
            loop.cancel()
        await asyncio.gather(*self.loops, return_exceptions=True)
        for slot in self.slots:
            slot.drop()

    async def _serve(self, slot: Slot) -> None:
        mine: list[_Trial] = []
        while True:
            try:
                await self._wanted()
                if not slot.workers and not await self._built(slot):
                    continue
                mine = self._first(slot)
                while mine:
                    await self._round(slot, mine)
            except SlotLost as lost:
                self._lost(slot, mine, f"{lost}", retry=True)
            except ray.exceptions.RayTaskError as error:
                # an exception may have left ranks at different collectives, so the slot is built anew; memory and disk
                # may be free again in a new process, an input is as wrong as before
                self._lost(slot, mine, str(error.cause), retry=not isinstance(error.cause, InputError))
            except Exception as error:
                self._lost(slot, mine, f"{type(error).__name__}: {error}", retry=True)

    async def _wanted(self) -> None:
        """Wait until the queue holds a trial, if only one that was stopped while it waited."""
        while not self.queue:
            self.queued.clear()
            await self.queued.wait()

    def _first(self, slot: Slot) -> list[_Trial]:
        """Take the next trial for a slot from the queue; nothing if another slot was quicker."""
        while self.queue:
            trial = self._fitting(slot)
            self.queue.remove(trial)
            if not trial.stopped:
                slot.teacher = trial.request.teacher_key or slot.teacher
                return [trial]
            self._stopped(trial)
        return []

    def _fitting(self, slot: Slot) -> _Trial:
        """Return one whose teacher's targets the slot has in memory, or that no other slot has; or the first."""
        if self.queue[0].attempts:  # it was lost, and has waited long enough
            return self.queue[0]
        others = {other.teacher for other in self.slots if other is not slot} - {None}
        mine = (t for t in self.queue if t.request.teacher_key is not None and t.request.teacher_key == slot.teacher)
        free = (t for t in self.queue if t.request.teacher_key not in others)
        return next(mine, None) or next(free, self.queue[0])

    def _stopped(self, trial: _Trial) -> None:
        self._finish(trial, {"status": "stopped", "epochs": len(trial.reports)})
        trial.ended = True

    async def _built(self, slot: Slot) -> bool:
        """Build a slot; trials fail only where no slot at all can be built any more."""
        started = time.monotonic()
        try:
            await slot.build()
        except Exception as error:
            slot.drop()
            slot.failures += 1
            why = f"no slot can be built: {type(error).__name__}: {error}"
            self.journal.note("slot not built", why=why, attempt=slot.failures)
            if all(not one.workers and one.failures >= self.sweep.retry.max_attempts for one in self.slots):
                for trial in self.queue:
                    self._fail(trial, why)
                self.queue.clear()
            await asyncio.sleep(1)
            return False
        slot.failures = 0
        self.journal.note("slot built", seconds=round(time.monotonic() - started, 2), pids=slot.pids)
        return True

    async def _round(self, slot: Slot, mine: list[_Trial]) -> None:
        """Let the slot's trials train until one of them completes an epoch."""
        for trial in list(mine):
            await self._admit(slot, mine, trial)
        room = await slot.room() if mine and mine[0].packable else 0
        for trial in self._more(mine, room):
            mine.append(trial)
            await self._admit(slot, mine, trial)
        while not self.run_ahead and any(not t.stopped and len(t.reports) >= t.allowed for t in mine):
            await asyncio.sleep(0.01)
        for trial in [trial for trial in mine if trial.stopped]:
            await slot.evict(trial.request.key)
            self._stopped(trial)
            mine.remove(trial)
        if not mine:
            return
        for report in await slot.advance():
            trial = self.trials[report["trial_key"]]
            # a trial whose last epoch was checkpointed but not closed repeats that epoch's report to say it is done
            if report["epoch"] > len(trial.reports) or report["done"]:
                trial.deliver(report)
        for trial in [trial for trial in mine if trial.ended]:
            slot.keys.discard(trial.request.key)
            mine.remove(trial)

    def _more(self, mine: list[_Trial], room: int) -> list[_Trial]:
        """Take from the queue what may join the slot's trials, and leave the other slots their share."""
        if not mine:
            return []
        waiting = [t for t in self.queue if t.packable and t.request.pack_key == mine[0].request.pack_key]
        share = -(-(len(waiting) + len(mine)) // len(self.slots)) - len(mine)
        taken = waiting[: max(0, min(room, share))]
        self.queue = [trial for trial in self.queue if trial not in taken]
        return [trial for trial in taken if not trial.stopped]

    async def _admit(self, slot: Slot, mine: list[_Trial], trial: _Trial) -> None:
        if trial.request.key in slot.keys:
            return
        try:
            start = await slot.admit(trial.request)
        except ray.exceptions.RayTaskError as error:
            if not isinstance(error.cause, HificlError) or len(slot.workers) > 1:
                raise
            slot.keys.discard(trial.request.key)
            mine.remove(trial)  # its own fault; the others go on
            self._again(trial, str(error.cause), retry=not isinstance(error.cause, InputError))
            return
        if trial.lost_at is not None:
            seconds = round(time.monotonic() - trial.lost_at, 2)
            self.journal.note("trial trains again", trial=trial.request.key, after_epoch=start, seconds=seconds)
            trial.lost_at = None
        # a trial resumed from its checkpoint reports the epochs behind it
        for row in self.store.epochs(trial.request.key)[len(trial.reports) : start]:
            trial.deliver({**row, "trial_key": trial.request.key, "done": False})

    def _lost(self, slot: Slot, mine: list[_Trial], why: str, *, retry: bool) -> None:
        """Give up a slot; its trials are tried again, each alone where it is not clear which one failed."""
        self.journal.note("slot lost", why=why, trials=[trial.request.key for trial in mine], pids=slot.pids)
        slot.drop()
        several = len(mine) > 1
        for trial in mine:
            trial.alone = trial.alone or several
            trial.lost_at = time.monotonic()
            self._again(trial, why, retry=retry or several)
        mine.clear()

    def _again(self, trial: _Trial, why: str, *, retry: bool) -> None:
        """Put a trial at the head of the queue, or let it fail where its attempts are used up."""
        trial.attempts += 1
        if retry and trial.attempts < self.sweep.retry.max_attempts:
            self._enqueue(trial, first=True)
        else:
            self._fail(trial, why)

    def _fail(self, trial: _Trial, why: str) -> None:
        attempts = trial.attempts
        self.journal.note("trial failed", trial=trial.request.key, why=why, attempts=attempts)
        self._finish(trial, {"status": "failed", "error": why, "attempts": attempts})
        trial.deliver({"error": why, "trial_key": trial.request.key, "epoch": len(trial.reports)})

    def _finish(self, trial: _Trial, record: dict[str, Any]) -> None:
        try:
            self.store.finish(trial.request.key, record)
        except WorkError as error:  # the disk is full: the trial stays open, which is as true
            self.journal.note("end not written", trial=trial.request.key, why=str(error))

    def _enqueue(self, trial: _Trial, *, first: bool = False) -> None:
        self.queue.insert(0 if first else len(self.queue), trial)
        self.queued.set()
