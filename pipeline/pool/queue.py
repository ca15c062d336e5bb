"""Which trial trains where, who shares a slot, who leaves, what becomes of a lost slot's trials: decisions alone.

Nothing here knows Ray, a clock, a file or a process. The dispatcher asks, and does what it is told.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from pipeline.config.load import TrialRequest
from pipeline.core.errors import HificlError, InputError


@dataclass(eq=False)
class Trial:
    """One trial, from its submission to its end.

    Attributes:
        request: what a slot is told of it.
        reports: how many it has delivered, one an epoch.
        allowed: epochs that the scheduler has asked for so far.
        attempts: failures since its last report.
        stopped: the scheduler has stopped it.
        ended: it finished, diverged, was stopped or failed.
        alone: it shares a slot with no other: a pack of it failed, and whose fault it was shows when each trains alone.
    """

    request: TrialRequest
    key: str = field(init=False)
    reports: int = 0
    allowed: int = 1
    attempts: int = 0
    stopped: bool = False
    ended: bool = False
    alone: bool = False

    def __post_init__(self) -> None:
        self.key = self.request.key  # a hash of the whole configuration: computed once

    @property
    def pack_key(self) -> str | None:
        """What the trials of a pack have in common; None: it trains alone."""
        return None if self.alone else self.request.pack_key


@dataclass(eq=False)
class SlotState:
    """What the queue knows of a slot.

    Attributes:
        trials: that train in it.
        teacher: whose targets its workers hold, as `TrialRequest.teacher_key`.
        built: whether it has workers.
        failures: to build it, one after another.
    """

    trials: list[Trial] = field(default_factory=list)
    teacher: str | None = None
    built: bool = False
    failures: int = 0


@dataclass(frozen=True)
class Requeued:
    """The trial is tried again, before those that have not begun."""

    trial: Trial


@dataclass(frozen=True)
class Stopped:
    """The trial ends where the scheduler stopped it."""

    trial: Trial


@dataclass(frozen=True)
class Failed:
    """The trial ends for `why`; it will not be tried again."""

    trial: Trial
    why: str


Decision = Requeued | Stopped | Failed


class SlotLost(Exception):
    """A slot's worker died or hangs; the slot is rebuilt and the trial is tried again."""


class SlotLeft(Exception):
    """A slot's node is to be taken away; the slot is built elsewhere, and its trials go on where they were kept."""


def is_of_one_trial(error: BaseException, ranks: int) -> bool:
    """Whether an error at a trial's admission leaves the slot's other trials as they were.

    Several ranks may stand at different collectives after any error, and an unforeseen one may have broken the process.
    """
    return isinstance(error, HificlError) and ranks == 1


def said(error: Exception) -> str:
    """Return why something failed in a line: of errors that are not the project's own, with their kind."""
    return str(error) if isinstance(error, HificlError | SlotLost | SlotLeft) else f"{type(error).__name__}: {error}"


class Queue:
    """The trials of a sweep, and the slots that they train in.

    Args:
        slots: how many.
        max_attempts: after how many failures without an epoch in between a trial, or the building of all slots, is
            given up.
        run_ahead: whether a trial goes on before the scheduler has seen its last epoch (right for FIFO alone).
        order: keys in the order in which their trials begin, whatever the order in which they are submitted.
    """

    def __init__(self, slots: int, max_attempts: int, *, run_ahead: bool, order: Sequence[str] = ()) -> None:
        self.max_attempts, self.run_ahead = max_attempts, run_ahead
        self.trials: dict[str, Trial] = {}
        self.waiting: list[Trial] = []
        self.parked: list[Trial] = []  # kept where they are compared, until the others have come so far
        self._position = {key: position for position, key in enumerate(order)}
        self.slots = [SlotState() for _ in range(slots)]

    # -- what Tune asks for --------------------------------------------------------------------------------------------

    def is_open(self, key: str) -> bool:
        """Whether the trial was submitted and has not ended."""
        return key in self.trials and not self.trials[key].ended

    @property
    def is_complete(self) -> bool:
        """Whether every trial of the order was submitted; what a searcher will ask for stands in none."""
        return self._position.keys() <= self.trials.keys()

    def submit(self, request: TrialRequest, *, done: bool) -> Trial:
        """Take a trial up; one that the ledger knows as done does not wait for a slot."""
        trial = self.trials[request.key] = Trial(request)
        if not done:
            self._wait([trial])
        return trial

    def _wait(self, trials: Sequence[Trial]) -> None:
        """Let trials wait for a slot, those that were lost first, then in the plan's order."""
        last = len(self._position)
        self.waiting += trials
        self.waiting.sort(key=lambda t: (not t.attempts, self._position.get(t.request.key, last)))

    def allow(self, key: str, epochs: int) -> None:
        """Note that the scheduler asks for a trial's first `epochs` reports."""
        trial = self.trials[key]
        trial.allowed = max(trial.allowed, epochs)

    def stop(self, key: str) -> list[Decision]:
        """Stop a trial: at once where it waits or is parked, before its slot's next round else (`release_stopped`)."""
        if not self.is_open(key):
            return []
        trial = self.trials[key]
        trial.stopped = True
        for place in (self.waiting, self.parked):
            if trial in place:
                place.remove(trial)
                return [self._stop(trial)]
        return []

    def park(self, slot: SlotState, trial: Trial) -> None:
        """Take a trial out of its slot until it is known whether it goes on."""
        slot.trials.remove(trial)
        self.parked.append(trial)

    def unpark(self, waits: Callable[[str], bool]) -> bool:
        """Let those that nobody has to wait for any more go on; return whether there are any."""
        free = [trial for trial in self.parked if not waits(trial.key)]
        self.parked = [trial for trial in self.parked if trial not in free]
        self._wait(free)
        return bool(free)

    # -- what a slot asks for ------------------------------------------------------------------------------------------

    def take(self, slot: SlotState) -> None:
        """Give an empty slot its next trial, where one waits.

        One that was lost goes first; then one whose teacher's targets the slot has in memory, or that no other slot
        has; or the first.
        """
        if not self.waiting:
            return
        trial = self.waiting[0]
        if not trial.attempts:
            others = {neighbour.teacher for neighbour in self.slots if neighbour is not slot} - {None}
            of_teacher = [t for t in self.waiting if slot.teacher is not None and t.request.teacher_key == slot.teacher]
            free = [t for t in self.waiting if t.request.teacher_key not in others]
            trial = (of_teacher or free or self.waiting)[0]
        self.waiting.remove(trial)
        slot.trials.append(trial)
        slot.teacher = trial.request.teacher_key or slot.teacher

    def partners(self, slot: SlotState) -> list[Trial]:
        """Return the waiting trials that may share the slot with those that train in it, its teacher's own first."""
        key = slot.trials[0].pack_key if slot.trials else None
        partners = [trial for trial in self.waiting if key is not None and trial.pack_key == key]
        return sorted(partners, key=lambda trial: trial.request.teacher_key != slot.teacher)

    def join(self, slot: SlotState, room: int) -> None:
        """Let up to `room` partners join a slot's trials, and leave the other slots their share."""
        partners = self.partners(slot)
        share = -(-(len(partners) + len(slot.trials)) // len(self.slots)) - len(slot.trials)
        for trial in partners[: max(0, min(room, share))]:
            self.waiting.remove(trial)
            slot.trials.append(trial)

    def must_wait(self, slot: SlotState) -> bool:
        """Whether a trial of the slot may not begin its next epoch before the scheduler has seen its last one."""
        return not self.run_ahead and any(t.reports >= t.allowed and not t.stopped for t in slot.trials)

    def release_stopped(self, slot: SlotState) -> list[Decision]:
        """End those of a slot's trials that the scheduler has stopped."""
        stopped = [trial for trial in slot.trials if trial.stopped]
        slot.trials = [trial for trial in slot.trials if not trial.stopped]
        return [self._stop(trial) for trial in stopped]

    # -- what comes of it ----------------------------------------------------------------------------------------------

    def report(self, key: str, epoch: int, *, done: bool) -> bool:
        """Count a report, and return whether it is news.

        A trial whose last epoch was checkpointed but not closed repeats that epoch's report to say that it is done.
        """
        trial = self.trials[key]
        if epoch <= trial.reports and not done:
            return False
        trial.reports += 1
        trial.attempts = 0
        trial.ended = trial.ended or done
        return True

    def release_ended(self, slot: SlotState) -> list[Trial]:
        """Take out of a slot what has ended."""
        ended = [trial for trial in slot.trials if trial.ended]
        slot.trials = [trial for trial in slot.trials if not trial.ended]
        return ended

    def refuse(self, slot: SlotState, trial: Trial, error: BaseException) -> list[Decision]:
        """Take a trial out of a slot that could not admit it; the others go on."""
        slot.trials.remove(trial)
        return self._again([trial], str(error), retry=not isinstance(error, InputError))

    def lose(self, slot: SlotState, error: Exception) -> list[Decision]:
        """Give up a slot; its trials are tried again, each alone where it is not clear which one failed.

        Memory and disk may be free again in a new process; an input is as wrong as before.
        """
        lost, slot.trials, slot.teacher, slot.built = slot.trials, [], None, False
        several = len(lost) > 1
        for trial in lost:
            trial.alone = trial.alone or several
        return self._again(lost, said(error), retry=several or not isinstance(error, InputError))

    def leave(self, slot: SlotState) -> list[Decision]:
        """Give up a slot whose node is to be taken away, which is no fault of its trials: none counts an attempt."""
        left, slot.trials, slot.teacher, slot.built = slot.trials, [], None, False
        stopped: list[Decision] = [self._stop(trial) for trial in left if trial.stopped]
        again = [trial for trial in left if not trial.ended]
        self.waiting[:0] = again
        return [*stopped, *map(Requeued, again)]

    def add_slot(self) -> SlotState:
        """Take in one more slot, which has yet to be built."""
        self.slots.append(SlotState())
        return self.slots[-1]

    def built(self, slot: SlotState) -> None:
        """Note that a slot has its workers."""
        slot.built, slot.failures = True, 0

    def not_built(self, slot: SlotState, error: Exception) -> list[Decision]:
        """Note that a slot could not be built; where none at all can be built any more, what waits fails."""
        slot.failures += 1
        if any(peer.built or peer.failures < self.max_attempts for peer in self.slots):
            return []
        waiting, self.waiting = self.waiting, []
        return [self._fail(trial, f"no slot can be built: {said(error)}") for trial in waiting]

    def _again(self, trials: Sequence[Trial], why: str, *, retry: bool) -> list[Decision]:
        """Put trials at the head of the queue; one fails where its attempts are used up."""
        decisions: list[Decision] = []
        for trial in trials:
            trial.attempts += 1
            if trial.stopped:
                decisions.append(self._stop(trial))
            elif retry and trial.attempts < self.max_attempts:
                decisions.append(Requeued(trial))
            else:
                decisions.append(self._fail(trial, why))
        self.waiting[:0] = [decision.trial for decision in decisions if isinstance(decision, Requeued)]
        return decisions

    @staticmethod
    def _stop(trial: Trial) -> Stopped:
        trial.ended = True
        return Stopped(trial)

    @staticmethod
    def _fail(trial: Trial, why: str) -> Failed:
        trial.ended = True
        return Failed(trial, why)


@dataclass(eq=False)
class _Group:
    """Trials of one search that are compared with each other.

    Attributes:
        keys: of those that came through all points before, in the plan's order.
        at: number of the point at which they are compared next.
    """

    keys: list[str]
    at: int = 0


class Halving:
    """Which trials of a search leave it at which point: successive halving (Jamieson and Talwalkar, 2016) by groups.

    At each point a group's trials are compared once each of those that came so far has its loss there, or has ended:
    the best share goes on. So who goes on hangs on losses alone, and never on which trial was first.

    Args:
        after: the points, in epochs, one after another.
        keep: what share goes on, rounded up.
        groups: the keys of those that are compared with each other; of equal losses the first in its group wins.
    """

    def __init__(self, after: Sequence[float] = (), keep: float = 0.5, groups: Iterable[Sequence[str]] = ()) -> None:
        self._after, self._keep = after, keep
        self._group_of = {key: group for group in map(_Group, map(list, groups)) for key in group.keys}
        self._losses: dict[tuple[str, float], float | None] = {}
        self._ended: set[str] = set()
        self._news: set[_Group] = set()  # groups that something was told of

    def tell(self, key: str, after: float, loss: float | None) -> None:
        """Take in a trial's loss at a point; None: it is past it, and nothing is known."""
        self._losses.setdefault((key, after), loss)
        self._note(key)

    def end(self, key: str) -> None:
        """Note that a trial has ended, so that nobody waits for it."""
        self._ended.add(key)
        self._note(key)

    def _note(self, key: str) -> None:
        if key in self._group_of:
            self._news.add(self._group_of[key])

    def waits(self, key: str) -> bool:
        """Whether a trial has come to a point at which others are still to come."""
        group = self._group_of.get(key)
        if group is None or key in self._ended or key not in group.keys or group.at == len(self._after):
            return False
        return (key, self._after[group.at]) in self._losses

    def leaving(self) -> dict[str, str]:
        """Compare the groups that are complete; return the trials that leave, and why."""
        out: dict[str, str] = {}
        while self._news:
            group = self._news.pop()
            while group.at < len(self._after) and all(self._is_there(key, self._after[group.at]) for key in group.keys):
                out |= self._compared(group, self._after[group.at])
                group.at += 1
        return {key: why for key, why in out.items() if key not in self._ended}

    def _is_there(self, key: str, after: float) -> bool:
        return key in self._ended or (key, after) in self._losses

    def _compared(self, group: _Group, after: float) -> dict[str, str]:
        """Take those out of a group that are not among the best at a point; return them, and why."""
        known = [(loss, key) for key in group.keys if (loss := self._losses.get((key, after))) is not None]
        ranked = sorted(known, key=lambda pair: pair[0])
        kept = math.ceil(self._keep * len(ranked))
        out = {
            key: f"left the search after {after:g} epochs: a loss of {loss:.4g}, number {place} of {len(ranked)}"
            for place, (loss, key) in enumerate(ranked[kept:], start=kept + 1)
        }
        group.keys = [key for key in group.keys if key not in out]
        return out
