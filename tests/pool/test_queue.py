"""The queue's decisions: by example, and as properties of slots that finish, fail, refuse and are lost at random."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pipeline.config.load import BackboneSource, TrialRequest
from pipeline.config.trial import TrialConfig
from pipeline.core.errors import InputError, WorkError
from pipeline.pool.queue import (
    Failed,
    Halving,
    Queue,
    Requeued,
    SlotLost,
    SlotState,
    Stopped,
    Trial,
    is_of_one_trial,
)

WRONG, TRANSIENT, NO_PLACE = InputError("no such file"), WorkError("no memory"), OSError("no place")


def request(number: int, teacher: str | None = None, pack: str | None = None) -> TrialRequest:
    config = TrialConfig(
        backbone="b", backbone_digest="0", task="t", manifest_digest="1", method="hificl", seed=number
    )  # fmt: skip
    return TrialRequest(config, "", "", BackboneSource(), pack_key=pack, teacher_key=teacher)


def a_queue(*requests: TrialRequest, slots: int = 1, max_attempts: int = 3, run_ahead: bool = True):
    """A queue of trials in front of slots that are built."""
    queue = Queue(slots, max_attempts, run_ahead=run_ahead)
    trials = [queue.submit(one, done=False) for one in requests]
    for slot in queue.slots:
        queue.built(slot)
    return queue, trials


def taken(queue: Queue, slot: SlotState) -> Trial:
    slot.trials.clear()
    queue.take(slot)
    return slot.trials[0]


# -- which trial is next -----------------------------------------------------------------------------------------------


def test_a_slot_takes_its_own_teacher_then_one_that_no_other_slot_has_then_the_first():
    def first_of(*teachers: str | None) -> str | None:
        queue, _ = a_queue(*(request(n, teacher) for n, teacher in enumerate(teachers)), slots=2)
        here, other = queue.slots
        here.teacher, other.teacher = "a", "b"
        return taken(queue, here).request.teacher_key

    assert first_of("b", "c", "a") == "a"
    assert first_of("b", "c") == "c"
    assert first_of("b", None) is None
    assert first_of("b") == "b"


def test_an_order_is_complete_once_all_its_trials_were_submitted():
    queue = Queue(1, 3, run_ahead=True, order=[request(0).key, request(1).key])
    for number, complete in ((2, False), (1, False), (0, True)):
        queue.submit(request(number), done=number == 1)
        assert queue.is_complete is complete


def test_trials_begin_in_the_plans_order_whatever_the_order_they_came_in_and_lost_ones_before_them():
    requests = [request(n) for n in range(4)]
    queue = Queue(1, 3, run_ahead=True, order=[r.key for r in requests[:3]])
    for number in (3, 2, 0):
        queue.submit(requests[number], done=False)
    (slot,) = queue.slots
    queue.built(slot)
    first = taken(queue, slot)
    assert first.request == requests[0]
    assert [type(decision) for decision in queue.lose(slot, SlotLost("killed"))] == [Requeued]
    queue.submit(requests[1], done=False)
    assert [trial.request for trial in queue.waiting] == [requests[n] for n in (0, 1, 2, 3)]


def test_a_fresh_slot_takes_what_came_first_and_remembers_its_teacher():
    queue, trials = a_queue(*(request(n, teacher) for n, teacher in enumerate(["a", "a", None, "b"])), slots=1)
    (slot,) = queue.slots
    assert [taken(queue, slot) for _ in range(4)] == trials
    assert slot.teacher == "b"
    assert queue.waiting == []
    slot.trials.clear()
    queue.take(slot)
    assert slot.trials == []


def test_a_trial_without_a_teacher_leaves_the_slot_its_targets_and_is_not_drawn_to_a_slot_without():
    queue, trials = a_queue(request(0), request(1, "a"), slots=2)
    assert taken(queue, queue.slots[0]) is trials[0]
    queue, trials = a_queue(request(0, "b"), request(1))
    (slot,) = queue.slots
    slot.teacher = "a"
    queue.waiting.reverse()
    assert taken(queue, slot) is trials[1] and slot.teacher == "a"


def test_what_was_lost_comes_before_a_teachers_trials_in_the_order_in_which_it_was_there():
    queue, trials = a_queue(
        request(0, "b", "p"), request(1, "b", "p"), request(2, "a"), request(3, "a"), slots=2, max_attempts=9
    )
    lost, other = queue.slots
    queue.take(lost)
    queue.join(lost, 1)
    assert lost.trials == trials[:1], "the other slot keeps its share"
    queue.slots.pop()
    queue.join(lost, 1)
    assert lost.trials == trials[:2]
    queue.lose(lost, TRANSIENT)
    assert queue.waiting == trials
    other.teacher = "a"
    assert [taken(queue, other) for _ in range(4)] == trials


# -- packs -------------------------------------------------------------------------------------------------------------


def test_only_trials_with_the_packs_key_join_and_none_beyond_the_room_or_the_slots_share():
    mixed = [request(n, pack="p" if n % 2 == 0 else "q") for n in range(8)]
    for slots, room, joined in [(1, 9, 4), (1, 2, 3), (1, 0, 1), (1, -3, 1), (2, 9, 2), (3, 9, 2), (4, 9, 1)]:
        queue, trials = a_queue(*mixed, slots=slots)
        queue.take(queue.slots[0])
        assert queue.partners(queue.slots[0]) == [trials[2], trials[4], trials[6]]
        queue.join(queue.slots[0], room)
        assert queue.slots[0].trials == [trials[0], trials[2], trials[4], trials[6]][:joined], (slots, room)
        assert len(queue.waiting) == 8 - joined


def test_a_slots_own_teachers_trials_join_before_those_of_another_and_else_the_order_holds():
    teachers = ["a", "b", "c", "b", "a", None]
    queue, trials = a_queue(*(request(n, teacher, pack="p") for n, teacher in enumerate(teachers)))
    (slot,) = queue.slots
    slot.teacher = "b"
    queue.take(slot)
    queue.join(slot, 3)
    assert slot.trials == [trials[1], trials[3], trials[0], trials[2]]


def test_trials_without_a_key_share_nothing_and_an_empty_slot_has_no_partners():
    queue, _ = a_queue(request(0), request(1))
    (slot,) = queue.slots
    assert queue.partners(slot) == []
    queue.take(slot)
    assert queue.partners(slot) == []
    queue.join(slot, 9)
    assert len(slot.trials) == 1


def test_a_pack_that_failed_trains_apart_even_for_a_wrong_input_and_then_it_shows_whose_it_was():
    queue, (a, b, c) = a_queue(*(request(n, pack="p") for n in range(3)))
    (slot,) = queue.slots
    queue.take(slot)
    queue.join(slot, 1)
    assert queue.lose(slot, WRONG) == [Requeued(a), Requeued(b)]
    assert (a.alone, b.alone, c.alone) == (True, True, False)
    assert slot.trials == [] and not slot.built and slot.teacher is None
    queue.built(slot)
    queue.take(slot)
    assert slot.trials == [a] and queue.partners(slot) == []
    assert queue.lose(slot, WRONG) == [Failed(a, "no such file")]
    assert not queue.is_open(a.key) and queue.is_open(b.key)
    queue.take(slot)
    queue.report(b.key, 1, done=True)
    assert queue.release_ended(slot) == [b] and slot.trials == []
    queue.take(slot)
    assert slot.trials == [c] and queue.partners(slot) == []


# -- failures ----------------------------------------------------------------------------------------------------------


def test_a_trial_is_tried_max_attempts_times_and_gets_them_back_with_an_epoch():
    queue, (trial,) = a_queue(request(0), max_attempts=3)
    (slot,) = queue.slots
    for epoch in (1, 2):
        for _ in range(2):
            queue.take(slot)
            assert queue.lose(slot, TRANSIENT) == [Requeued(trial)]
        assert trial.attempts == 2
        queue.take(slot)
        assert queue.report(trial.key, epoch, done=False) and trial.attempts == 0
        queue.lose(slot, TRANSIENT)
        assert trial.attempts == 1
        trial.attempts = 0
    for expected in (Requeued(trial), Requeued(trial), Failed(trial, "no memory")):
        queue.take(slot)
        assert queue.lose(slot, TRANSIENT) == [expected]
    assert trial.attempts == 3 and trial.ended and queue.waiting == []


def test_one_attempt_means_one():
    queue, (trial,) = a_queue(request(0), max_attempts=1)
    queue.take(queue.slots[0])
    assert queue.lose(queue.slots[0], TRANSIENT) == [Failed(trial, "no memory")]


def test_a_refused_trial_leaves_the_others_in_their_slot():
    queue, (a, b, c) = a_queue(*(request(n, pack="p") for n in range(3)))
    (slot,) = queue.slots
    queue.take(slot)
    queue.join(slot, 2)
    assert queue.refuse(slot, b, TRANSIENT) == [Requeued(b)]
    assert slot.trials == [a, c] and queue.waiting == [b] and not b.alone and slot.built
    assert queue.refuse(slot, a, WRONG) == [Failed(a, "no such file")]
    assert slot.trials == [c]


def test_a_node_that_is_taken_away_costs_no_trial_an_attempt_and_ends_those_that_were_stopped():
    queue, (a, b, c) = a_queue(*(request(n, "t", "p") for n in range(3)), max_attempts=1)
    (slot,) = queue.slots
    queue.take(slot)
    queue.join(slot, 1)
    queue.stop(b.key)
    assert queue.leave(slot) == [Stopped(b), Requeued(a)]
    assert queue.waiting == [a, c] and a.attempts == 0 and not a.alone
    assert slot.trials == [] and not slot.built and slot.teacher is None


def test_an_error_at_admission_is_the_trials_own_where_it_is_a_known_one_and_no_other_rank_waits():
    assert is_of_one_trial(WRONG, 1) and is_of_one_trial(TRANSIENT, 1)
    assert not is_of_one_trial(WRONG, 2)
    assert not is_of_one_trial(RuntimeError("?"), 1)


def test_what_waits_fails_only_when_no_slot_at_all_can_be_built():
    queue, (a, b) = a_queue(request(0), request(1), slots=2, max_attempts=2)
    first, second = queue.slots
    first.built = second.built = False
    assert queue.not_built(first, NO_PLACE) == [] and first.failures == 1
    assert queue.not_built(first, NO_PLACE) == []
    assert queue.not_built(second, NO_PLACE) == []
    queue.built(first)
    assert first.failures == 0
    assert queue.not_built(second, NO_PLACE) == [], "the other one trains"
    first.built = False
    assert queue.not_built(first, NO_PLACE) == []
    why = "no slot can be built: OSError: no place"
    assert queue.not_built(first, NO_PLACE) == [Failed(a, why), Failed(b, why)]
    assert queue.waiting == [] and a.ended and b.ended


# -- the scheduler's word ----------------------------------------------------------------------------------------------


def test_a_slot_waits_for_the_scheduler_unless_it_may_run_ahead():
    for run_ahead in (False, True):
        queue, (a, b) = a_queue(request(0, pack="p"), request(1, pack="p"), run_ahead=run_ahead)
        (slot,) = queue.slots
        assert not queue.must_wait(slot)
        queue.take(slot)
        queue.join(slot, 1)
        assert not queue.must_wait(slot), "the first epoch is allowed"
        queue.report(a.key, 1, done=False)
        assert queue.must_wait(slot) is not run_ahead
        queue.allow(a.key, 2)
        assert not queue.must_wait(slot)
        queue.allow(a.key, 1)
        assert a.allowed == 2, "a proxy that died asks again for what it has seen"
        queue.report(b.key, 1, done=False)
        assert queue.must_wait(slot) is not run_ahead
        queue.stop(b.key)
        assert not queue.must_wait(slot)


def test_a_stopped_trial_leaves_its_slot_before_its_next_epoch_and_the_queue_at_once():
    queue, (a, b, c) = a_queue(*(request(n, pack="p") for n in range(3)))
    (slot,) = queue.slots
    queue.take(slot)
    queue.join(slot, 1)
    assert queue.stop(a.key) == [] and not a.ended
    assert queue.release_stopped(slot) == [Stopped(a)] and a.ended and slot.trials == [b]
    assert queue.release_stopped(slot) == []
    assert queue.stop(c.key) == [Stopped(c)] and queue.waiting == [] and c.ended
    assert queue.stop(c.key) == [] and queue.stop("unknown") == []
    queue.stop(b.key)
    assert queue.lose(slot, TRANSIENT) == [Stopped(b)] and queue.waiting == []


def test_a_parked_trial_frees_its_slot_and_goes_on_in_the_plans_order_or_ends_at_once():
    requests = [request(n, pack="p") for n in range(4)]
    queue = Queue(1, 3, run_ahead=True, order=[r.key for r in requests])
    a, b, c, d = (queue.submit(r, done=False) for r in requests)
    (slot,) = queue.slots
    queue.take(slot)
    queue.join(slot, 2)
    for trial in (b, a, c):
        queue.park(slot, trial)
    assert slot.trials == [] and queue.waiting == [d] and queue.is_open(a.key)
    assert queue.stop(c.key) == [Stopped(c)] and not queue.is_open(c.key)
    assert not queue.unpark(lambda key: True) and queue.parked == [b, a]
    assert queue.unpark(lambda key: key == b.key) and queue.parked == [b] and queue.waiting == [a, d]
    assert queue.unpark(lambda key: False) and queue.waiting == [a, b, d]


# -- who leaves its search ---------------------------------------------------------------------------------------------


def test_the_best_share_of_those_that_came_so_far_goes_on_once_all_are_there():
    halving = Halving((0.5, 1.0), 0.5, [list("abcde"), list("xy")])
    for key, loss in zip("dcba", (0.1, 0.2, 0.4, 0.4), strict=True):
        halving.tell(key, 0.5, loss)
        assert halving.waits(key) and halving.leaving() == {}
    halving.tell("e", 0.5, 0.3)
    halving.tell("e", 0.5, 9.0)  # what is told again changes nothing
    assert halving.leaving() == {
        "a": "left the search after 0.5 epochs: a loss of 0.4, number 4 of 5",
        "b": "left the search after 0.5 epochs: a loss of 0.4, number 5 of 5",
    }, "three of five go on; of equal losses the first in the plan is better"
    assert not any(map(halving.waits, "abcdexy")) and halving.leaving() == {}
    halving.tell("x", 0.5, 1.0)
    halving.tell("c", 1.0, 0.2)
    halving.end("d")  # without a loss there: failed, or stopped by hand
    assert halving.waits("c") and halving.waits("x") and not halving.waits("stranger")
    halving.tell("e", 1.0, 0.1)
    assert halving.leaving() == {"c": "left the search after 1 epochs: a loss of 0.2, number 2 of 2"}
    halving.end("y")
    assert halving.leaving() == {} and not halving.waits("x"), "nobody is left to compare it with"


def test_a_trial_that_was_past_the_point_already_is_neither_ranked_nor_waited_for():
    halving = Halving((0.5,), 0.5, [list("abc")])
    for key, loss in zip("abc", (None, 2.0, 1.0), strict=True):
        halving.tell(key, 0.5, loss)
    assert list(halving.leaving()) == ["b"] and not halving.waits("a")


@given(st.data())
def test_who_leaves_hangs_on_losses_alone_and_nobody_waits_for_ever(data):
    """Groups told in any order, some trials ending on the way, against a plain loop over points."""
    points = data.draw(st.sampled_from([(0.5,), (0.25, 1.0), (0.5, 1.0, 2.5)]))
    keep = data.draw(st.sampled_from([0.25, 0.34, 0.5, 0.9]))
    sizes = data.draw(st.lists(st.integers(2, 6), min_size=1, max_size=3))
    groups = [[f"{number}{letter}" for letter in "abcdef"[:size]] for number, size in enumerate(sizes)]
    keys = [key for group in groups for key in group]
    losses = {(key, point): float(data.draw(st.integers(0, 4))) for key in keys for point in points}
    fails = set(data.draw(st.lists(st.sampled_from(keys), unique=True, max_size=2)))  # before the first point

    left = set()
    for group in groups:
        there = [key for key in group if key not in fails]
        for point in points:
            ranked = sorted(there, key=lambda key: losses[key, point])
            left |= set(ranked[-int(-keep * len(ranked) // 1) :])
            there = [key for key in there if key not in left]

    halving, out, at = Halving(points, keep, groups), set(), dict.fromkeys(keys, 0)
    while moving := [key for key in keys if key not in out and at[key] < len(points) and not halving.waits(key)]:
        key = data.draw(st.sampled_from(moving))
        if key in fails:
            halving.end(key)
            at[key] = len(points)
        else:
            halving.tell(key, points[at[key]], losses[key, points[at[key]]])
            at[key] += 1
        out |= halving.leaving().keys()
    assert out == left
    assert all(at[key] == len(points) for key in keys if key not in out), "nobody waits for ever"


# -- reports and the ledger --------------------------------------------------------------------------------------------


def test_a_report_counts_once_and_an_end_even_if_its_epoch_was_reported():
    queue, (trial,) = a_queue(request(0))
    assert queue.report(trial.key, 1, done=False)
    assert not queue.report(trial.key, 1, done=False) and trial.reports == 1
    assert queue.report(trial.key, 2, done=False) and trial.reports == 2 and not trial.ended
    assert queue.report(trial.key, 2, done=True) and trial.ended
    assert not queue.is_open(trial.key)


def test_a_trial_of_the_ledger_waits_for_no_slot_and_an_ended_one_may_be_submitted_again():
    queue, _ = a_queue()
    known = queue.submit(request(0), done=True)
    assert queue.waiting == [] and queue.is_open(known.key)
    queue.report(known.key, 1, done=False)
    queue.report(known.key, 2, done=True)
    assert not queue.is_open(known.key) and not queue.is_open("unknown")
    again = queue.submit(request(0), done=False)
    assert again is not known and queue.waiting == [again] and queue.is_open(again.key)


# -- everything at random ----------------------------------------------------------------------------------------------

EPOCHS = 3


class Pool(RuleBasedStateMachine):
    """Slots that are built, take, pack, report, refuse and are lost, and a scheduler that stops."""

    @initialize(slots=st.integers(1, 3), max_attempts=st.integers(1, 3), run_ahead=st.booleans())
    def begin(self, slots: int, max_attempts: int, run_ahead: bool) -> None:
        self.queue = Queue(slots, max_attempts, run_ahead=run_ahead)
        self.trials: list[Trial] = []
        self.ends: Counter[Trial] = Counter()
        self.failures: Counter[Trial] = Counter()  # since the last epoch

    def decided(self, decisions) -> None:
        for decision in decisions:
            if isinstance(decision, Requeued):
                assert decision.trial in self.queue.waiting and not decision.trial.stopped
            else:
                assert decision.trial not in self.queue.waiting
                self.ends[decision.trial] += 1

    def failed(self, trials: list[Trial], error: Exception, decisions) -> None:
        several = len(trials) > 1
        for trial, decision in zip(trials, decisions, strict=True):
            self.failures[trial] += 1
            gives_up = self.failures[trial] >= self.queue.max_attempts or (error is WRONG and not several)
            expected = Stopped if trial.stopped else Failed if gives_up else Requeued
            assert decision.trial is trial and type(decision) is expected

    @rule(data=st.data())
    def leave(self, data) -> None:
        if (slot := self.slot(data)) is None:
            return
        left, attempts = list(slot.trials), [trial.attempts for trial in slot.trials]
        self.decided(self.queue.leave(slot))
        assert [trial.attempts for trial in left] == attempts
        assert all(trial.ended is trial.stopped for trial in left)

    def slot(self, data, *, empty: bool | None = None) -> SlotState | None:
        fit = [s for s in self.queue.slots if s.built and (empty is None or empty is not bool(s.trials))]
        return data.draw(st.sampled_from(fit)) if fit else None

    @rule(teacher=st.sampled_from([None, "a", "b"]), pack=st.sampled_from([None, "p", "p", "q"]))
    def submit(self, teacher: str | None, pack: str | None) -> None:
        self.trials.append(self.queue.submit(request(len(self.trials), teacher, pack), done=False))

    @rule(data=st.data(), works=st.booleans())
    def build(self, data, works: bool) -> None:
        for slot in self.queue.slots:
            if not slot.built and self.queue.waiting:
                if works:
                    self.queue.built(slot)
                else:
                    self.decided(self.queue.not_built(slot, NO_PLACE))

    @rule(data=st.data(), room=st.integers(0, 4))
    def take(self, data, room: int) -> None:
        if (slot := self.slot(data, empty=True)) is None:
            return
        head = self.queue.waiting[:1]
        self.queue.take(slot)
        assert len(slot.trials) == len(head)
        if head and head[0].attempts:
            assert slot.trials == head
        self.join(slot, room)

    @rule(data=st.data(), room=st.integers(0, 4))
    def fill(self, data, room: int) -> None:
        if (slot := self.slot(data, empty=False)) is not None:
            self.join(slot, room)

    def join(self, slot: SlotState, room: int) -> None:
        before, waiting = list(slot.trials), list(self.queue.waiting)
        partners = self.queue.partners(slot)
        self.queue.join(slot, room)
        joined = slot.trials[len(before) :]
        assert slot.trials[: len(before)] == before and joined == partners[: len(joined)]
        assert len(joined) <= room
        assert not joined or len(slot.trials) <= -(-(len(before) + len(partners)) // len(self.queue.slots))
        assert self.queue.waiting == [trial for trial in waiting if trial not in joined]

    @rule(data=st.data())
    def train(self, data) -> None:
        if (slot := self.slot(data, empty=False)) is None:
            return
        self.decided(self.queue.release_stopped(slot))
        if self.queue.must_wait(slot):
            assert not self.queue.run_ahead
            return
        for trial in slot.trials:
            assert not trial.stopped
            done = trial.reports + 1 == EPOCHS
            assert self.queue.report(trial.key, trial.reports + 1, done=done)
            self.failures[trial] = 0
            self.ends[trial] += done
            assert done or not self.queue.report(trial.key, trial.reports, done=False)
        assert all(trial.ended for trial in self.queue.release_ended(slot))

    @rule(data=st.data(), error=st.sampled_from([WRONG, TRANSIENT]))
    def lose(self, data, error: Exception) -> None:
        if (slot := self.slot(data)) is None:
            return
        trials = list(slot.trials)
        decisions = self.queue.lose(slot, error)
        self.failed(trials, error, decisions)
        self.decided(decisions)
        assert not slot.built and not slot.trials
        assert len(trials) < 2 or all(trial.alone for trial in trials)

    @rule(data=st.data(), error=st.sampled_from([WRONG, TRANSIENT]))
    def refuse(self, data, error: Exception) -> None:
        if (slot := self.slot(data, empty=False)) is None:
            return
        trial = data.draw(st.sampled_from(slot.trials))
        decisions = self.queue.refuse(slot, trial, error)
        self.failed([trial], error, decisions)
        self.decided(decisions)

    @precondition(lambda self: self.trials)
    @rule(data=st.data(), epochs=st.integers(1, EPOCHS))
    def allow(self, data, epochs: int) -> None:
        self.queue.allow(data.draw(st.sampled_from(self.trials)).key, epochs)

    @rule(data=st.data())
    def park(self, data) -> None:
        if (slot := self.slot(data, empty=False)) is not None:
            trial = data.draw(st.sampled_from(slot.trials))
            if not trial.stopped:  # as the dispatcher has it
                self.queue.park(slot, trial)

    @rule(data=st.data())
    def unpark(self, data) -> None:
        stay = set(data.draw(st.lists(st.sampled_from([t.key for t in self.queue.parked or self.trials] or [""]))))
        parked = list(self.queue.parked)
        assert self.queue.unpark(lambda key: key in stay) is any(trial.key not in stay for trial in parked)
        assert self.queue.parked == [trial for trial in parked if trial.key in stay]

    @precondition(lambda self: self.trials)
    @rule(data=st.data())
    def stop(self, data) -> None:
        self.decided(self.queue.stop(data.draw(st.sampled_from(self.trials)).key))

    @invariant()
    def every_open_trial_is_in_one_place_and_every_ended_one_in_none(self) -> None:
        places = Counter(
            [*self.queue.waiting, *self.queue.parked, *(trial for slot in self.queue.slots for trial in slot.trials)]
        )
        for trial in self.trials:
            assert places[trial] == (not trial.ended)
            assert self.ends[trial] == trial.ended

    @invariant()
    def packs_share_a_key_and_attempts_are_bounded_and_nothing_stopped_waits(self) -> None:
        for slot in self.queue.slots:
            assert not slot.trials or slot.built
            if len(slot.trials) > 1:
                (key,) = {trial.pack_key for trial in slot.trials}
                assert key is not None
        assert not any(trial.stopped for trial in (*self.queue.waiting, *self.queue.parked))
        for trial in self.trials:
            assert trial.attempts <= self.queue.max_attempts and (trial.ended or trial.attempts == self.failures[trial])

    def teardown(self) -> None:
        """Nothing goes wrong any more: every trial comes to its end, in so many rounds as there are epochs."""
        for slot in self.queue.slots:
            if not slot.built:
                self.queue.built(slot)
        self.queue.unpark(lambda key: False)
        for trial in self.trials:
            self.queue.allow(trial.key, EPOCHS)
        rounds = EPOCHS * len(self.trials) + 1
        for _ in range(rounds):
            for slot in self.queue.slots:
                if not slot.trials:
                    self.queue.take(slot)
                self.decided(self.queue.release_stopped(slot))
                for trial in slot.trials:
                    done = trial.reports + 1 >= EPOCHS
                    assert self.queue.report(trial.key, trial.reports + 1, done=done)
                    self.ends[trial] += done
                self.queue.release_ended(slot)
        assert all(trial.ended for trial in self.trials)
        assert all(self.ends[trial] == 1 for trial in self.trials)


TestPool = Pool.TestCase
TestPool.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)
pytest.mark.timeout(120)(TestPool)
