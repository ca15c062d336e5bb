"""What the evaluators' head does when a call fails or its process dies: on a real Ray, evaluators told what to do."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray

from pipeline.config.load import BackboneSource, TrialRequest, load
from pipeline.config.trial import EvaluationConfig, TrialConfig
from pipeline.core.errors import InputError
from pipeline.pool import evaluators, slot
from pipeline.pool.cluster import running
from pipeline.pool.evaluators import BesideTraining
from pipeline.pool.slot import KeptSlots
from pipeline.records.store import TrialStore
from tests.support.told_actors import Lender, Looking, Told

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def params():
    made = load(ROOT / "params.yaml", ["sweep.slots=1", "sweep.pack=auto", "sweep.retry.max_attempts=2"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "0")  # as on a machine with a GPU
        with running(made.sweep):
            yield made


@pytest.fixture
def score(params, tmp_path, monkeypatch):
    """`score(names)` scores trials of these names; gives results by name, and the calls."""
    monkeypatch.setattr(evaluators, "Evaluator", Told)
    monkeypatch.setattr(evaluators, "_together", lambda sweep: sweep.pack)  # as on a GPU
    source = BackboneSource(variant="tiny")
    config = TrialConfig.model_construct(backbone="b", task="t", manifest_digest="m")

    def run(names: str, kept: KeptSlots | None = None):
        jobs = [
            (TrialRequest(config, name, str(tmp_path), source, pack_key="one"), EvaluationConfig(trial=name))
            for name in names
        ]
        found = dict(evaluators.score_on_cluster(params, jobs, kept or KeptSlots()))
        calls = (tmp_path / "calls").read_text().splitlines()
        return {request.folder: found[evaluation.key] for request, evaluation in jobs}, calls

    return run


def test_trials_that_answer_together_are_scored_each(score):
    found, calls = score("ab")
    assert found == {"a": "record of a", "b": "record of b"}
    assert calls[0] == "answer ab" and sorted(calls[1:]) == ["score a", "score b"]


def test_one_that_fails_in_a_pack_does_not_take_the_others_along(score, tmp_path):
    (tmp_path / "fail-a").touch()
    found, calls = score("abc")
    assert isinstance(found.pop("a"), ValueError) and found == {"b": "record of b", "c": "record of c"}
    assert calls.count("answer a") == 1


@pytest.mark.parametrize(("what", "deaths"), [("answer", 1), ("answer", 2), ("score", 1)])
def test_a_call_whose_process_died_is_made_again_a_limited_number_of_times(score, tmp_path, what, deaths):
    for number in range(deaths):
        (tmp_path / f"die-{what}-{number}").touch()
    found, calls = score("a")
    assert len([call for call in calls if call.startswith(what)]) == 2
    assert found["a"] == "record of a" if deaths == 1 else isinstance(found["a"], ray.exceptions.RayActorError)


def test_beside_training_a_worker_that_dies_is_given_back_as_lost_and_its_call_made_by_another(
    tmp_path, monkeypatch, params
):
    config = TrialConfig.model_construct(backbone="b", task="t", manifest_digest="m")
    source, kept = BackboneSource(variant="tiny"), []
    jobs = [
        (TrialRequest(config, name, str(tmp_path), source, pack_key="one"), EvaluationConfig(trial=name))
        for name in "abc"
    ]
    (tmp_path / "die-answer-0").touch()
    (tmp_path / "fail-b").touch()
    beside = BesideTraining(SimpleNamespace(params=params), TrialStore(tmp_path / "runs"))
    ready = iter([jobs, []])
    monkeypatch.setattr(beside, "_ready", lambda: next(ready, []))
    monkeypatch.setattr(evaluators, "_keep_beside", lambda job, score: kept.append(score))
    lender = Lender.remote([Told.remote(), Told.remote()])
    beside._score(lender)
    assert sorted(kept) == ["record of a", "record of c"]  # the stage that scores says what is wrong with b
    first, second = ray.get(lender.taken_back.remote()).values()
    assert "died" in first and not second


def test_workers_that_a_training_left_score_and_one_that_dies_gives_way(params, score, tmp_path, monkeypatch):
    monkeypatch.setattr(slot, "Worker", Told)
    kept, built = KeptSlots(), slot.Slot(params.sweep, 1, str(ROOT))
    asyncio.run(built.build())
    kept.put([built])
    with monkeypatch.context() as patch:
        patch.setattr(evaluators, "_evaluator", lambda _: pytest.fail("an evaluator was started"))
        assert score("ab", kept)[0] == {"a": "record of a", "b": "record of b"}
    assert kept.take(1, 9) == [built] and built.idle
    kept.put([built])
    (tmp_path / "die-answer-0").touch()
    assert score("c", kept)[0] == {"c": "record of c"}
    assert kept.take(1, 9) == [] and not built.workers
    again = slot.Slot(params.sweep, 2, str(ROOT))
    asyncio.run(again.build())  # on all the processors that there are
    again.drop()


def test_slots_of_another_size_end_where_theirs_is_asked_for(params, monkeypatch):
    monkeypatch.setattr(slot, "Worker", Told)
    one, two = (slot.Slot(params.sweep, size, str(ROOT)) for size in (1, 2))
    kept = KeptSlots()
    asyncio.run(one.build())
    kept.put([one])
    assert kept.take(2, 1) == [] and not one.workers
    asyncio.run(two.build())
    kept.put([two])
    assert kept.take(2, 0) == [] and two.workers  # there is work for none, but it has a work's size
    kept.drop()
    assert not two.workers and kept.take(2, 1) == []


def test_who_asks_for_no_gpu_is_shown_none(params, monkeypatch):
    assert params.sweep.gpus_per_worker == 0
    monkeypatch.setattr(evaluators, "Evaluator", Looking)
    monkeypatch.setattr(slot, "Worker", Looking)
    (_, evaluator), trainer = evaluators._evaluator(params), slot.Slot(params.sweep, 1, str(ROOT))
    assert ray.get(evaluator.sees.remote()) == ""
    ray.kill(evaluator)
    asyncio.run(trainer.build())
    assert ray.get(trainer.workers[0].sees.remote()) == ""
    trainer.drop()


def test_who_asks_for_a_gpu_that_does_not_work_is_refused_in_a_line():
    plain = evaluators.Evaluator.__ray_metadata__.modified_class
    assert plain(2, str(ROOT), 0.0).bench.device == "cpu"
    with pytest.raises(InputError, match=r"no GPU works here.*set sweep.gpus_per_worker to 0") as said:
        _ = plain(2, str(ROOT), 1.0).bench
    assert "\n" not in str(said.value) and "sweep.gpus_per_worker: 1" in str(said.value)
