"""Evaluations cut up for a cluster: every job is answered once in every part, and nothing is waited for in vain."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config.load import BackboneSource, TrialRequest
from pipeline.config.trial import EvaluationConfig, TrialConfig
from pipeline.evaluate.score import Answers
from pipeline.pool.evaluation_calls import TOGETHER, Calls, Complete, Ledger, Unit, evaluation_units


def jobs(number, packable=lambda seed: True):
    source = BackboneSource(variant="tiny")
    trial = TrialConfig.model_construct(backbone="b", task="t", manifest_digest="m")
    return [
        (TrialRequest(trial, "", "", source, pack_key="one" if packable(i) else None), EvaluationConfig(trial=str(i)))
        for i in range(number)
    ]


@given(number=st.integers(1, 20), slots=st.integers(1, 70), pack=st.one_of(st.just("auto"), st.integers(1, 9)))
def test_every_job_is_answered_once_in_every_part(number, slots, pack):
    found = evaluation_units(jobs(number, lambda seed: seed % 3), slots, pack)
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
    assert [unit.part for unit in evaluation_units(jobs(1), 4, 1)] == [(i, 4) for i in range(4)]
    assert {unit.part for unit in evaluation_units(jobs(9), 4, 1)} == {(0, 1)}
    assert [len(unit.jobs) for unit in evaluation_units(jobs(9), 1, 4)] == [4, 4, 1]


def test_only_what_is_alike_answers_together_and_a_trial_without_a_key_alone():
    (request, evaluation), (other, second) = jobs(2)
    foreign = replace(request, config=request.config.model_copy(update={"manifest_digest": "another"}))
    keyless = replace(request, pack_key=None)
    for apart in (
        [(request, evaluation), (replace(other, pack_key="two"), second)],
        [(request, evaluation), (foreign, second)],
        [(request, evaluation), (other, second.model_copy(update={"num_beams": 3}))],
        [(keyless, evaluation), (keyless, second)],
    ):
        assert [len(unit.jobs) for unit in evaluation_units(apart, 1, 4)] == [1, 1]
    assert [len(unit.jobs) for unit in evaluation_units([(request, evaluation), (other, second)], 1, 4)] == [2]
    assert evaluation_units([], 4, 4) == []


def test_an_evaluation_is_scored_with_its_own_trials_answers():
    (unit,) = evaluation_units(jobs(2), 1, 4)
    ledger = Ledger()
    ledger.expect([unit])
    answers = [Answers({1: "red"}, 0.5), Answers({1: "blue"}, 0.25)]
    assert [one.parts for one in ledger.put(unit, answers)] == [[answers[0]], [answers[1]]]
    with pytest.raises(ValueError, match="argument"):
        ledger.put(unit, answers[:1])


def test_a_given_up_evaluation_is_forgotten_once_and_the_others_complete():
    (unit,) = evaluation_units(jobs(3), 1, "auto")
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


def test_trials_that_answered_together_answer_alone_after_a_failure_and_in_its_place():
    calls = Calls(jobs(3), 1, "auto", max_attempts=2)
    pack = calls.take()
    assert len(pack.jobs) == 3 and calls.take() is None
    assert calls.failed(pack, died=False) == []
    alone = [calls.take() for _ in range(3)]
    assert [call.jobs for call in reversed(alone)] == [(job,) for job in pack.jobs]
    assert {call.part for call in alone} == {pack.part} and calls.take() is None
    (key,) = (evaluation.key for _, evaluation in alone[0].jobs)
    assert calls.failed(alone[0], died=False) == [key] and calls.failed(alone[0], died=False) == []


def test_a_call_is_made_max_attempts_times_where_its_process_dies():
    calls = Calls(jobs(1), 1, 1, max_attempts=3)
    for _ in range(2):
        assert calls.failed(calls.take(), died=True) == []
    last = calls.take()
    calls.answered(last, [Answers({}, 0.0)])
    score = calls.take()
    assert isinstance(score, Complete) and len(score.parts) == 1
    for _ in range(2):
        assert calls.failed(score, died=True) == [] and calls.take() is score
    assert calls.failed(score, died=True) == [score.job[1].key] and calls.take() is None


@given(
    number=st.integers(1, 6), slots=st.integers(1, 5), pack=st.integers(1, 4), most=st.integers(1, 3), data=st.data()
)
def test_every_evaluation_ends_once_whatever_fails_and_a_neighbour_takes_none_along(number, slots, pack, most, data):
    asked = jobs(number)
    calls, deaths, ends = Calls(asked, slots, pack, most), Counter(), []
    assert 1 <= calls.slots <= slots
    while call := calls.take():
        result = data.draw(st.sampled_from(["good", "good", "raises", "dies"]))
        if result == "good" and isinstance(call, Unit):
            assert 1 <= len(call.jobs) <= pack
            calls.answered(call, [Answers({}, 0.0)] * len(call.jobs))
        elif result == "good":
            ends.append(call.job[1].key)
        else:
            deaths[call.key] += result == "dies"
            assert deaths[call.key] <= most
            hopeless = deaths[call.key] == most if result == "dies" else len(call.jobs) == 1
            given_up = calls.failed(call, died=result == "dies")
            open_ones = [evaluation.key for _, evaluation in call.jobs if evaluation.key not in ends]
            assert given_up == (open_ones if hopeless else [])
            ends += given_up
    assert Counter(ends) == dict.fromkeys((evaluation.key for _, evaluation in asked), 1)


def test_every_call_has_a_key_of_its_own():
    calls = [*evaluation_units(jobs(3), 8, 2), *(Complete(job, []) for job in jobs(3))]
    assert len({call.key for call in calls}) == len(calls)
