"""The stage `evaluate` around its scoring, which is put in: what is said, written and logged of each score."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipeline.config.trial import EvaluationConfig
from pipeline.core.errors import InputError
from pipeline.pool import supervisor
from pipeline.records.evaluation import Evaluation, Evaluations, Prediction
from pipeline.records.store import TrialStore
from pipeline.records.trial import TrialEnd
from pipeline.sweep import evaluate as evaluation
from pipeline.sweep import train as training
from pipeline.sweep.mlflow_sync import MlflowSync
from pipeline.tracking.client import Tracker
from pipeline.tracking.records import FINISHED, TrialRunStart
from pipeline.tracking.store import Unreachable
from tests.support.plans import make_plan


@pytest.fixture
def scored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Three trained trials with their runs, and what scoring them would give."""
    plan = make_plan(tmp_path, 3)
    store, out = TrialStore(plan.places.runs), Evaluations(tmp_path / "evaluations")
    tracker = Tracker(f"sqlite:///{tmp_path / 'mlflow.db'}", tmp_path)
    parent = tracker.open_sweep("study", tags={"sweep_key": "k"}, description="")
    sync = MlflowSync(tracker, store, plan, ["study"])
    sync.parents["study"] = parent
    todo, results = [], []
    for number, (key, config) in enumerate(plan.trials.items()):
        store.open(config)
        store.finish(key, TrialEnd(status="finished", epochs=0, train_flops=12 * number))
        sync.on_end(key, None)
        asked = EvaluationConfig(trial=key)
        todo.append((config, asked))
        predictions = [{"sample_id": 7, "prediction": "red", "score": 1.0, "question": "Which colour?",
                        "references": ["red"], "image": "data/7.png"}]  # fmt: skip
        left_out = [] if number else ["coco: no CHAIR: not there"]
        results.append((asked.key, Evaluation(
            trial=key, config=config.model_dump(), evaluation=asked.model_dump(), metric="CIDEr", unit="fraction",
            value=1 / 3, metrics={"CIDEr": 1 / 3}, num_samples=40, details={"left_out": left_out * 2},
            predictions=[Prediction(**fields) for fields in predictions],
        )))  # fmt: skip
    tracker.close(parent, FINISHED)
    monkeypatch.setattr(supervisor, "score_all", lambda params, jobs, driver: iter(results))
    return SimpleNamespace(plan=plan, store=store, out=out, tracker=tracker, todo=todo, folder=tmp_path)


def opened(scored: SimpleNamespace) -> MlflowSync:
    sync = MlflowSync(scored.tracker, scored.store, scored.plan, [])
    sync.find_runs([config.key for config, _ in scored.todo])
    return sync


def run(scored: SimpleNamespace) -> MlflowSync:
    sync = opened(scored)
    assert not list(evaluation._score(None, scored.plan, scored.todo, scored.out, sync, None))
    return sync


def records(scored: SimpleNamespace) -> list[Evaluation]:
    return [scored.out.read(asked.key) for _, asked in scored.todo]


def test_what_a_score_left_out_is_said_once(scored, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(evaluation, "say", said.append)
    run(scored)
    assert said == ["left out: coco: no CHAIR: not there"]


def test_a_score_is_with_its_run_with_its_costs_samples_and_some_answers(scored):
    run(scored)
    for number, (config, asked) in enumerate(scored.todo):
        logged = scored.tracker.read_run(scored.tracker.find_run(config.key))
        assert records(scored)[number].run_id == logged.run_id
        costs = {"train_flops": 12.0 * number} if number else {}
        assert logged.metrics == {"test_CIDEr": 0.333333, **costs}
        assert "Which colour?" in scored.tracker.read_artifact(logged.run_id, "answers.json")
        assert logged.tags["evaluations"] == asked.key
        inputs = {one.context: (one.name, json.loads(one.source)) for one in logged.inputs}
        assert {context: name for context, (name, _) in inputs.items()} == {
            "training": "mini-vqa/train", "selection": "mini-vqa/selection", "evaluation": "mini-vqa/evaluation",
        }  # fmt: skip
        assert {source["uri"] for _, source in inputs.values()} == {"manifests/mini-vqa/manifest.json"}
        assert inputs["evaluation"][1]["samples"] == "40 of evaluation, first"


def test_a_store_that_goes_away_meanwhile_loses_no_score_and_gets_it_later(scored, monkeypatch):
    gone = scored.tracker.log_scores

    def away(*_, **__):
        raise Unreachable("the MLflow store cannot be reached", where="there")

    monkeypatch.setattr(scored.tracker, "log_scores", away)
    sync = run(scored)
    assert all(record.run_id and record.scored_by and record.value == 1 / 3 for record in records(scored))
    monkeypatch.setattr(scored.tracker, "log_scores", gone)
    sync.settle(10)
    runs = scored.tracker.runs_of({config.key for config, _ in scored.todo})
    assert len(runs) == 3 and all(one.evaluations for every in runs.values() for one in every)


def test_scores_that_mlflow_lacks_are_shown_by_their_files(scored):
    run(scored)
    config, asked = scored.todo[0]
    run_id = scored.tracker.find_run(config.key)
    parent = scored.tracker.open_sweep("study", tags={"sweep_key": "another"}, description="")
    later = scored.tracker.open_trial("study", parent, TrialRunStart(config.key, "n"))
    scored.tracker.close_all(FINISHED)
    scored.tracker.mlflow.delete_tag(run_id, "evaluations")  # a store of before
    opened(scored).score(config, asked.key)
    logged = scored.tracker.read_run(run_id)
    assert logged.tags["evaluations"] == asked.key and len(logged.inputs) == 3
    history = scored.tracker.mlflow.get_metric_history(run_id, "test_CIDEr")
    assert [one.step for one in history] == [0]
    found_done = scored.tracker.read_run(later)  # by another sweep, which had no descriptions yet
    assert found_done.metrics["test_CIDEr"] == 0.333333
    assert "trained on 1000 samples" in found_done.tags["mlflow.note.content"]


def test_neither_a_sweep_nor_an_evaluation_begins_while_another_holds_the_store(scored, monkeypatch):
    monkeypatch.setattr(training, "unheard", lambda *_: [])
    with scored.store.lock("another one"):
        for begin in (
            lambda: evaluation.evaluate(None, ["study"], supervisor.Drivers(), scored.folder),
            lambda: training._swept(None, ["study"], scored.folder, scored.plan, None),
        ):
            with pytest.raises(InputError, match=f"held by another one, pid {os.getpid()} on .*Wait for it"):
                begin()
