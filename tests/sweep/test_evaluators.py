"""What the evaluators' head does when a call fails or its process dies; Ray is a list of calls here."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import ray.exceptions

from pipeline.config import BackboneSource
from pipeline.request import TrialRequest
from pipeline.sweep import evaluators
from pipeline.train.scoring import Answers
from pipeline.trial import EvaluationConfig, TrialConfig

SWEEP = SimpleNamespace(pack="auto", retry=SimpleNamespace(max_attempts=2))


def job(name: str):
    trial = TrialConfig.model_construct(backbone="b", task="t", manifest_digest="m")
    return TrialRequest(trial, name, "", BackboneSource(variant="tiny"), pack_key="one"), EvaluationConfig(trial=name)


@pytest.fixture
def score(monkeypatch):
    """`score(names, fate)` scores jobs; `fate(what, names)` may raise. Returns results by name, and the calls."""

    def run(names, fate):
        calls, results, jobs = [], [], [job(name) for name in names]

        def remote(what, result):
            def call(*arguments):
                requests = arguments[0] if what == "answer" else [arguments[0]]
                calls.append((what, "".join(request.folder for request in requests)))
                results.append(result(requests))
                return len(calls) - 1

            return SimpleNamespace(remote=call)

        def get(number):
            fate(*calls[number])
            return results[number]

        actor = SimpleNamespace(
            answer=remote("answer", lambda requests: tuple(Answers({}, 0.0) for _ in requests)),
            score=remote("score", lambda requests: f"record of {requests[0].folder}"),
        )
        fake = SimpleNamespace(wait=lambda waiting: (waiting[:1], waiting[1:]), get=get, exceptions=ray.exceptions)
        monkeypatch.setattr(evaluators, "ray", fake)
        monkeypatch.setattr(evaluators, "count_slots", lambda *_: 1)
        monkeypatch.setattr(evaluators, "_evaluator", lambda params: actor)
        found = dict(evaluators._Scoring(SimpleNamespace(sweep=SWEEP), jobs).run())
        return {one[0].folder: found[one[1].key] for one in jobs}, calls

    return run


def test_trials_that_answer_together_are_scored_each(score):
    found, calls = score("ab", lambda what, names: None)
    assert found == {"a": "record of a", "b": "record of b"}
    assert calls == [("answer", "ab"), ("score", "b"), ("score", "a")]


def test_one_that_fails_in_a_pack_does_not_take_the_others_along(score):
    def fate(what, names):
        if "a" in names and what == "answer":
            raise ray.exceptions.RayTaskError("answer", "", ValueError(names))

    found, calls = score("abc", fate)
    assert isinstance(found.pop("a"), ValueError) and found == {"b": "record of b", "c": "record of c"}
    assert calls.count(("answer", "a")) == 1


@pytest.mark.parametrize("what", ["answer", "score"])
@pytest.mark.parametrize("deaths", [1, 2])
def test_a_call_whose_process_died_is_made_again_a_limited_number_of_times(score, what, deaths):
    left = [deaths]

    def fate(called, names):
        if called == what and left[0]:
            left[0] -= 1
            raise ray.exceptions.RayActorError

    found, calls = score("a", fate)
    assert len([one for one in calls if one[0] == what]) == 2
    assert found["a"] == "record of a" if deaths == 1 else isinstance(found["a"], ray.exceptions.RayActorError)
