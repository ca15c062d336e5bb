from __future__ import annotations

import json
from types import SimpleNamespace

from pipeline.sweep import evaluation, evaluators


def test_what_a_score_left_out_is_said_once(tmp_path, monkeypatch):
    said, logged = [], {}
    result = {"metrics": {"CIDEr": 1.0}, "details": {"left_out": ["coco: no CHAIR: not there"]}}
    done = [("a", {**result, "trial": "t1"}), ("b", {**result, "trial": "t2"})]
    chair = {"metrics": {"CIDEr": 1.0, "CHAIRs": 0.5}, "details": {}, "trial": "t3"}
    monkeypatch.setattr(evaluators, "score_all", lambda params, jobs: iter([*done, ("c", chair)]))
    monkeypatch.setattr(evaluation, "say", said.append)
    plan = SimpleNamespace(request_of=lambda config: config, places=SimpleNamespace(runs=tmp_path))
    mlflow = SimpleNamespace(
        find_run=lambda trial: f"run of {trial}",
        provenance={"commit": "0", "dirty": False},
    )
    tracker = SimpleNamespace(tracker=mlflow, log_evaluation=lambda run, scores, path: logged.update({run: scores}))
    for trial in ("t1", "t2", "t3"):
        (tmp_path / trial / "adapter").mkdir(parents=True)
    records = {"t3": {"train_flops": 12, "peak_memory_bytes": None}}
    store = SimpleNamespace(done=records.get)
    assert not list(evaluation._score(None, plan, [], tmp_path, tracker, store))
    assert said == ["left out: coco: no CHAIR: not there"]
    assert logged["run of t3"] == {"test_CIDEr": 1.0, "test_CHAIRs": 0.5, "train_flops": 12.0}
    assert logged["run of t1"] == {"test_CIDEr": 1.0}
    assert json.loads((tmp_path / "c.json").read_text())["metrics"] == chair["metrics"]
