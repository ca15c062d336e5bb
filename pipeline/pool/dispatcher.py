"""The Ray actor in front of the resident pool: it hands trials to slots and their reports back.

Ray Tune decides which trials live; its actors (`pool.proxy`) hand their trial to this actor and wait for reports. A
slot (`pool.slot`) trains one trial, or several that share forward passes. A worker that dies, hangs or is killed costs
its slot a rebuild and its trials the time since the last epoch's checkpoint. Who trains where is decided in
`pool.queue`; here is what waits, writes and asks.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import ray

from pipeline.config.load import TrialRequest
from pipeline.core.errors import HificlError, WorkError
from pipeline.pool.processes import BACK_SECONDS, GROW_SECONDS, LEND_SECONDS
from pipeline.pool.queue import (
    Decision,
    Failed,
    Halving,
    Queue,
    Requeued,
    SlotLeft,
    SlotLost,
    SlotState,
    Stopped,
    Trial,
    is_of_one_trial,
    said,
)
from pipeline.pool.slot import Lent, Slot
from pipeline.records import Unreadable, Unseen
from pipeline.records.journal import Journal
from pipeline.records.store import Displaced, TrialStore
from pipeline.records.trial import EpochReport, TrialEnd, TrialReport, replayed
from pipeline.train import checkpoint

Resolve = Callable[[dict[str, Any]], TrialRequest]


@dataclass
class _Mailbox:
    """What a trial has reported, for the actor that waits for it."""

    reports: list[TrialReport] = field(default_factory=list)
    news: asyncio.Event = field(default_factory=asyncio.Event)


@ray.remote(num_cpus=0, max_concurrency=10000)
class Dispatcher:
    """Hands trials to slots and their reports back.

    Args:
        resolve: gives the request of a trial from Tune's configuration of it. It is pickled to this actor: a plain
            table of requests for grid and random search, so that neither torch nor transformers is imported here.
        store: the trial store, at an absolute path, as the sweep holds it.
        queue: who trains where.
        slots: one for each that the queue knows, not built yet.
        room: how many slots fit the cluster now, which is asked again and again; None: there will be no more.
        another: makes a slot.
        halving: which trials leave their search early.
    """

    grow_seconds = GROW_SECONDS

    def __init__(
        self, resolve: Resolve, store: TrialStore, queue: Queue, slots: Sequence[Slot],
        room: Callable[[], int] | None = None, another: Callable[[], Slot] | None = None,
        halving: Halving | None = None,
    ) -> None:  # fmt: skip
        self.halving = halving or Halving()
        self.left: dict[str, str] = {}  # why trials have left their search, to which none comes back
        self.resolve, self.queue, self.slots, self.room, self.another = resolve, queue, list(slots), room, another
        self.store, self.journal = store, Journal(store.root)
        self.queued = asyncio.Event()
        self.mail: dict[str, _Mailbox] = {}
        self.lost_at: dict[str, float] = {}  # when a trial's slot was lost
        self.packs: dict[SlotState, tuple[int, bool]] = {}  # what was said of a slot's trials, and whether some joined
        self.loops: list[asyncio.Task] = []
        self.lent: dict[Slot, int] = {}  # slots that score meanwhile, with the number of the lending
        self.lendings, self.lends = 0, True

    async def start(self) -> None:
        """Build the slots; returns at once, the queue is served as slots come up."""
        pairs = zip(self.slots, self.queue.slots, strict=True)
        self.loops = [asyncio.ensure_future(self._serve(slot, state)) for slot, state in pairs]
        if self.room and self.another:
            self.loops.append(asyncio.ensure_future(self._grow(self.room, self.another)))

    async def num_slots(self) -> int:
        """Return how many slots there are, built or not."""
        return len(self.slots)

    async def submit(self, tune_config: dict[str, Any]) -> str:
        """Queue a trial and return its key; one that the ledger knows as done is replayed from it.

        Raises:
            Displaced: another sweep has taken the store over.
        """
        request = self.resolve(tune_config)
        key = request.key
        if self.queue.is_open(key) or (key in self.left and key in self.mail):
            return key
        self.store.check_held()
        self._compare()  # by what the ledger knows of those that were compared before
        self.store.open(request.config)
        end = self.store.done(key)
        known = await self._seen_epochs(key) if end is not None and end.final else []
        self.mail[key] = _Mailbox()
        if end is not None and end.final:
            self.queue.submit(request, done=True)
            self._deliver(replayed(key, known, end.status))
        else:
            self.queue.submit(request, done=False)
            self.store.reopen(key)
            if key in self.left:
                self._carry_out(self.queue.stop(key))
            self.queued.set()
        return key

    async def next(self, key: str, seen: int) -> TrialReport:
        """Wait for report number `seen` (0-based) of a trial; asking for it allows that epoch to be trained."""
        mail = self.mail[key]
        self.queue.allow(key, seen + 1)
        while len(mail.reports) <= seen:
            mail.news.clear()
            await mail.news.wait()
        return mail.reports[seen]

    async def stop(self, key: str) -> None:
        """Stop a trial; what it has learned stays in its checkpoint."""
        self._carry_out(self.queue.stop(key))

    async def pids(self) -> list[list[int]]:
        """Return the process ids of every slot's workers."""
        return [slot.pids for slot in self.slots]

    async def lend(self, after: int) -> Lent | None:
        """Give a slot that has nothing to train, once no trial waits and more than `after` have ended.

        None: there will be none, for the sweep is over.
        """
        while self.lends:
            ended = sum(trial.ended for trial in self.queue.trials.values())
            if ended > after and self.queue.is_complete and not self.queue.waiting:
                free = [slot for slot in self._idle_slots() if slot.world_size == 1 and slot not in self.lent]
                if free:
                    # a kept worker remembers what another dispatcher has called off
                    self.lendings = max(self.lendings + 1, time.monotonic_ns())
                    self.lent[free[0]] = self.lendings
                    return Lent(free[0].workers[0], self.lendings, ended)
            await asyncio.sleep(LEND_SECONDS)
        return None

    async def take_back(self, lending: int, why_lost: str = "") -> None:
        """Let a slot that was lent train again; its worker may have died meanwhile."""
        for slot, state in zip(self.slots, self.queue.slots, strict=True):
            if self.lent.get(slot) == lending:  # else it was given up meanwhile
                del self.lent[slot]
                if why_lost:
                    self._lost(slot, state, SlotLost(why_lost))

    async def _call_back(self, slot: Slot) -> None:
        """Have a slot that is lent come back, which its worker does behind the batch that it answers.

        Raises:
            SlotLost: it does not.
        """
        slot.call_off(self.lent[slot])
        hang = slot.sweep.retry.hang_seconds
        until = time.monotonic() + hang
        while slot in self.lent:
            if time.monotonic() > until:
                del self.lent[slot]
                raise SlotLost(f"it was lent, and did not come back within {hang:.0f} s")
            await asyncio.sleep(BACK_SECONDS)

    async def end_lending(self) -> None:
        """Lend nothing any more, and have what is lent come back."""
        self.lends = False
        for slot, lending in self.lent.items():
            slot.call_off(lending)

    async def release(self) -> list[Slot]:
        """End what was stopped last; return the slots that are idle with their workers, and end the others'."""
        await self._end_loops()
        for state in self.queue.slots:
            self._carry_out(self.queue.release_stopped(state))
        idle = [slot for slot in self._idle_slots() if slot not in self.lent]
        for slot in self.slots:
            if slot not in idle:
                slot.drop()
            slot.work = None  # which no other process can wait for
        return idle

    async def close(self, seconds: float = 0.0) -> None:
        """End what was stopped last, and all workers, which have so long to keep their last step."""
        await self._end_loops()
        if seconds:
            await asyncio.gather(*(slot.keep(seconds) for slot in self.slots))
        for slot, state in zip(self.slots, self.queue.slots, strict=True):
            self._carry_out(self.queue.release_stopped(state))
            slot.drop()

    def _idle_slots(self) -> list[Slot]:
        """Return the slots that train nothing; one that is being built has workers that know nothing yet."""
        pairs = zip(self.slots, self.queue.slots, strict=True)
        return [slot for slot, state in pairs if state.built and slot.idle and not state.trials]

    async def _end_loops(self) -> None:
        for loop in self.loops:
            loop.cancel()
        await asyncio.gather(*self.loops, return_exceptions=True)

    async def _grow(self, room: Callable[[], int], another: Callable[[], Slot]) -> None:
        """Add slots where nodes have joined the cluster and trials wait."""
        while True:
            await asyncio.sleep(self.grow_seconds)
            with suppress(ray.exceptions.RayError):  # the head is away, which others notice
                for _ in range(min(room() - len(self.slots), len(self.queue.waiting))):
                    slot, state = another(), self.queue.add_slot()
                    self.slots.append(slot)
                    self.loops.append(asyncio.ensure_future(self._serve(slot, state)))
                    self.journal.note("slot added")

    async def _serve(self, slot: Slot, state: SlotState) -> None:
        while True:
            try:
                while not self.queue.waiting or slot in self.lent:
                    if self.queue.waiting:
                        await self._call_back(slot)
                        continue
                    self.queued.clear()
                    await self.queued.wait()
                if not state.built and not await self._built(slot, state):
                    continue
                self.queue.take(state)
                while state.trials:
                    await self._round(slot, state)
            except Displaced as error:  # the stage sees it too, and ends this sweep
                self.journal.note("slot not served", why=str(error), pids=slot.pids)
                slot.drop()
                return
            except Exception as error:
                self._lost(slot, state, error)

    async def _built(self, slot: Slot, state: SlotState) -> bool:
        started = time.monotonic()
        try:
            await slot.build()
        except Exception as error:
            slot.drop()
            decisions = self.queue.not_built(state, error)
            self.journal.note("slot not built", why=f"no slot can be built: {said(error)}", attempt=state.failures)
            self._carry_out(decisions)
            await asyncio.sleep(1)
            return False
        self.queue.built(state)
        self.journal.note("slot built", seconds=round(time.monotonic() - started, 2), pids=slot.pids)
        return True

    async def _round(self, slot: Slot, state: SlotState) -> None:
        """Let the slot's trials train until one of them completes an epoch."""
        await self._let_in(slot, state)
        if self.queue.partners(state):
            before = len(state.trials)
            self.queue.join(state, await slot.room())
            size = len(state.trials), len(state.trials) > before
            if slot.why_room and self.packs.get(state) != size:
                self.journal.note("pack", trials=size[0], room=slot.why_room, pids=slot.pids)
                self.packs[state] = size
            await self._let_in(slot, state)
        while self.queue.must_wait(state):
            await asyncio.sleep(0.01)
        await self._release(slot, state)
        if state.trials:
            await self._take_in(slot, state, await slot.advance())
        slot.keys.difference_update(trial.key for trial in self.queue.release_ended(state))

    async def _take_in(self, slot: Slot, state: SlotState, reports: Sequence[TrialReport]) -> None:
        """Hand over what a slot reports; trials that wait for those they are compared with free their places."""
        for report in reports:
            for loss in report.compared:
                self.halving.tell(report.key, loss.after, loss.loss)
        self._deliver(reports)
        self._compare()
        for trial in [trial for trial in state.trials if not trial.stopped and self.halving.waits(trial.key)]:
            self.queue.park(state, trial)
            await slot.evict(trial.key)

    def _compare(self) -> None:
        """Stop the trials that leave their search; let those go on that need not wait any more."""
        for key, why in self.halving.leaving().items():
            self.journal.note("trial leaves its search", trial=key, why=why)
            self.left[key] = why
            self._carry_out(self.queue.stop(key))
        if self.queue.unpark(self.halving.waits):
            self.queued.set()

    async def _let_in(self, slot: Slot, state: SlotState) -> None:
        """Admit a slot's trials but for those that were stopped by hand; a ledger that cannot be read is read later."""
        with suppress(Unreadable):
            for key in [trial.key for trial in state.trials if not trial.stopped and self.store.halted(trial.key)]:
                self.journal.note("trial stopped by hand", trial=key)
                self._carry_out(self.queue.stop(key))
        await self._release(slot, state)
        await self._admit(slot, state)

    async def _release(self, slot: Slot, state: SlotState) -> None:
        """End those of a slot's trials that were stopped."""
        stopped = self.queue.release_stopped(state)
        self._carry_out(stopped)
        for key in [decision.trial.key for decision in stopped]:
            if key in slot.keys:
                await slot.evict(key)

    async def _seen_epochs(self, key: str) -> list[EpochReport]:
        """Return the epochs of a trial that has ended, once this machine sees them; after a minute they are damaged."""
        while True:
            try:
                return self.store.epochs(key)
            except Unseen:
                await asyncio.sleep(1.0)

    async def _admit(self, slot: Slot, state: SlotState) -> None:
        for trial in [trial for trial in state.trials if trial.key not in slot.keys]:
            key = trial.key
            self.store.check_held()  # a worker takes a trial from whoever has it
            try:
                start = await slot.admit(trial.request)
            except Exception as error:
                if not is_of_one_trial(error, slot.world_size):
                    raise
                slot.keys.discard(key)
                self._carry_out(self.queue.refuse(state, trial, error))
                continue
            if key in self.lost_at:
                seconds = round(time.monotonic() - self.lost_at.pop(key), 2)
                self.journal.note("trial trains again", trial=key, after_epoch=start, seconds=seconds)
            # a trial resumed from its checkpoint reports the epochs behind it
            behind = self.store.epochs(key)[trial.reports : start]
            self._deliver(replayed(key, behind))

    def _lost(self, slot: Slot, state: SlotState, error: Exception) -> None:
        keys, left = [trial.key for trial in state.trials], isinstance(error, SlotLeft)
        self.journal.note("slot left" if left else "slot lost", why=said(error), trials=keys, pids=slot.pids)
        slot.drop()
        self.lost_at |= dict.fromkeys(keys, time.monotonic())
        self._carry_out(self.queue.leave(state) if left else self.queue.lose(state, error))

    def _carry_out(self, decisions: Iterable[Decision]) -> None:
        for decision in decisions:
            trial, key = decision.trial, decision.trial.key
            match decision:
                case Requeued():
                    self.queued.set()
                case Stopped():
                    self._finish(key, self._stopped(trial))
                    self._put(TrialReport(key, trial.reports, end="stopped"))
                case Failed(why=why):
                    self.journal.note("trial failed", trial=key, why=why, attempts=trial.attempts)
                    self._finish(key, TrialEnd(status="failed", error=why, attempts=trial.attempts))
                    self._put(TrialReport(key, trial.reports, end="failed", error=why))
            if trial.ended:
                self.halving.end(key)
                self._compare()

    def _stopped(self, trial: Trial) -> TrialEnd:
        """Return the end of a trial that was stopped, by its checkpoint; or by what it reported, where none is seen."""
        end = TrialEnd(status="stopped", epochs=0)
        with suppress(HificlError):
            end = checkpoint.stopped(self.store.trial(trial.key).checkpoint)
        if (end.epochs or 0) < trial.reports:
            end = TrialEnd(status="stopped", epochs=trial.reports)
        return end.model_copy(update={"error": self.left.get(trial.key)})

    def _finish(self, key: str, end: TrialEnd) -> None:
        try:
            self.store.finish(key, end)
        except (WorkError, OSError) as error:  # a full disk, no more files: the trial stays open, which is as true
            self.journal.note("end not written", trial=key, why=str(error))

    def _deliver(self, reports: Iterable[TrialReport]) -> None:
        for report in reports:
            if report.metrics is None and report.end is None:  # it is compared, which concerns nobody else
                continue
            if self.queue.report(report.key, report.epoch, done=report.end is not None):
                self._put(report)
            if report.end is not None:
                self.halving.end(report.key)

    def _put(self, report: TrialReport) -> None:
        mail = self.mail[report.key]
        mail.reports.append(report)
        mail.news.set()
