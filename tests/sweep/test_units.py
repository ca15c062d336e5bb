"""Evaluations cut up for a cluster: every job is answered once in every part, and nothing is waited for in vain."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pipeline.config import BackboneSource
from pipeline.request import TrialRequest
from pipeline.sweep.units import TOGETHER, Complete, Ledger, Unit, split, units
from pipeline.train.scoring import Answers
from pipeline.trial import EvaluationConfig, TrialConfig


def jobs(number, packable=lambda seed: True):
    source = BackboneSource(variant="tiny")
    trial = TrialConfig.model_construct(backbone="b", task="t", manifest_digest="m")
    return [
        (TrialRequest(trial, "", "", source, pack_key="one" if packable(i) else None), EvaluationConfig(trial=str(i)))
        for i in range(number)
    ]


@given(number=st.integers(1, 20), slots=st.integers(1, 70), pack=st.one_of(st.just("auto"), st.integers(1, 9)))
def test_every_job_is_answered_once_in_every_part(number, slots, pack):
    found = units(jobs(number, lambda seed: seed % 3), slots, pack)
    seen: dict[str, list] = {}
    for unit in found:
        assert len(unit.jobs) <= (TOGETHER if pack == "auto" else pack)
        for _, evaluation in unit.jobs:
            seen.setdefault(evaluation.trial, []).append(unit.part)
    assert set(seen) == {str(i) for i in range(number)}
    for parts in seen.values():
        (n,) = {n for _, n in parts}
        assert sorted(i for i, _ in parts) == list(range(n))
    assert len(found) >= slots or all(len(parts) == 1 for parts in seen.values())
    ledger = Ledger()
    ledger.expect(found)
    complete = [one.job for unit in found for one in ledger.put(unit, [Answers({}, 0.0)] * len(unit.jobs))]
    assert sorted(int(job[1].trial) for job in complete) == list(range(number))


def test_few_jobs_fill_the_slots_and_many_do_not_wait_for_each_other():
    assert [unit.part for unit in units(jobs(1), 4, 1)] == [(i, 4) for i in range(4)]
    assert {unit.part for unit in units(jobs(9), 4, 1)} == {(0, 1)}
    assert [len(unit.jobs) for unit in units(jobs(9), 1, 4)] == [4, 4, 1]


def test_a_failed_pack_is_tried_one_by_one_and_given_up_once():
    (unit,) = units(jobs(3), 1, "auto")
    assert [one.jobs for one in split(unit)] == [(job,) for job in unit.jobs]
    ledger = Ledger()
    halves = [Unit(unit.jobs, (i, 2)) for i in range(2)]
    ledger.expect(halves)
    assert not ledger.put(halves[0], [Answers({}, 0.0)] * 3)
    lost = unit.jobs[0][1].key
    assert ledger.give_up(lost) and not ledger.give_up(lost)
    complete = ledger.put(halves[1], [Answers({}, 0.0)] * 3)
    assert [(*one.key, len(one.parts)) for one in complete] == [(job[1].key, 2) for job in unit.jobs[1:]]
    # a complete one can still fail, where it is scored
    assert [ledger.give_up(*one.key) for one in complete] == [True, True]


def test_every_call_has_a_key_of_its_own():
    calls = [*units(jobs(3), 8, 2), *(Complete(job, []) for job in jobs(3))]
    assert len({call.key for call in calls}) == len(calls)
