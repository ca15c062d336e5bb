"""Whole runs: DVC, Ray Tune, DeepSpeed, MLflow and the report, for real, on a tiny backbone."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import sqlite3
import time
from collections import Counter

import pytest

from pipeline import adapters
from tests.e2e.conftest import copied, make_project

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]


def trials(project) -> dict[str, dict]:
    return {p.parent.name: json.loads(p.read_text()) for p in (project.folder / "runs").glob("*/done.json")}


def when_done(project) -> dict[str, float]:
    return {p.parent.name: p.stat().st_mtime_ns for p in (project.folder / "runs").glob("*/done.json")}


def query(project, sql: str) -> list[tuple]:
    with sqlite3.connect(f"file:{project.folder / 'mlflow.db'}?mode=ro", uri=True) as db:
        return db.execute(sql).fetchall()


def test_every_trial_ends_and_is_scored(project):
    ends = trials(project)
    assert len(ends) == 5 and {end["status"] for end in ends.values()} == {"finished"}
    trained = [end for end in ends.values() if end["epochs"]]
    assert len(trained) == 3 and all(end["epochs"] == 2 and end["trainable_parameters"] > 0 for end in trained)
    study = json.loads((project.folder / "evaluations/studies/small.json").read_text())
    assert {cell["row"]: cell["status"] for cell in study["cells"]} == dict.fromkeys(
        ("zero-shot", "icl-2", "hificl", "mimic"), "done"
    )
    hificl = next(cell for cell in study["cells"] if cell["row"] == "hificl")
    assert len(hificl["candidates"]) == 2 and hificl["searched"]["rank"] in (1, 2)
    best = max(c["selection_score"] for c in hificl["candidates"])
    assert next(c for c in hificl["candidates"] if c["trial"] == hificl["trial"])["selection_score"] == best


def test_the_adapter_is_rebuilt_from_its_own_files(project):
    folder = next(p.parent for p in (project.folder / "runs").glob("*/adapter/adapter_config.json"))
    config = adapters.read_config(folder)
    trial = json.loads((folder.parent / "config.json").read_text())["config"]
    assert config.method == trial["method"] and config.options == trial["options"]
    assert config.extra["manifest"] == trial["manifest_digest"]


def test_predictions_lie_beside_every_score(project):
    for path in (project.folder / "evaluations").glob("*.json"):
        record = json.loads(path.read_text())
        assert len(record["predictions"]) == record["num_samples"] == 4
        mean = sum(p["score"] for p in record["predictions"]) / 4
        assert mean == pytest.approx(record["value"], abs=0.01)


def test_mlflow_is_clean_and_complete(project):
    assert query(project, "select count(*) from runs where status='RUNNING'") == [(0,)]
    twice = "select count(*) from (select 1 from metrics group by run_uuid,key,step having count(*)>1)"
    assert query(project, twice) == [(0,)]
    children = query(project, "select run_uuid from tags where key='mlflow.parentRunId'")
    assert len(children) == 5
    steps = query(project, "select run_uuid, count(*) from metrics where key='train_loss' group by run_uuid")
    assert sorted(n for _, n in steps) == [2, 2, 2]
    commits = query(project, "select count(*) from tags where key='mlflow.source.git.commit'")
    assert commits[0][0] == 6  # five children and their parent
    assert query(project, "select count(distinct key) from params where key in ('rank','learning_rate','seed')") == [
        (3,)
    ]
    assert query(project, "select count(*) from inputs")[0][0] >= 5


def test_the_report_has_the_columns_that_others_read(project):
    with open(project.folder / "reports/small.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["backbone", "task", "method", "metric", "value", "std", "seeds", "paper", "run_ids"]
    assert len(rows) == 4
    known = {run for (run,) in query(project, "select run_uuid from runs")}
    assert all(run in known for row in rows for run in row["run_ids"].split(";"))
    page = (project.folder / "reports/index.html").read_text()
    assert "A small study" in page and all(row["run_ids"] in page for row in rows)


def test_a_second_repro_does_nothing(project):
    before = when_done(project)
    done = project.python("-m", "dvc", "repro")
    assert "Running stage" not in done.stdout and when_done(project) == before


def test_one_more_value_trains_only_the_new_trial_and_one_that_lacks_only_its_end_is_ended(project):
    """The second is what a crash between the last checkpoint and done.json leaves behind."""
    ends, before = trials(project), when_done(project)
    key = next(key for key, end in sorted(ends.items()) if end["epochs"])
    folder = project.folder / "runs" / key
    checkpoints = {p: p.stat().st_mtime_ns for p in folder.glob("checkpoint/*/state.json")}
    (folder / "done.json").unlink()
    project.one_slot()
    project.change(lambda raw: raw["studies"]["small"]["methods"]["hificl"]["search"].update(rank=[1, 2, 3]))
    done = project.python("-m", "dvc", "repro")
    shown = (done.stdout + done.stderr).splitlines()
    head = next(number for number, line in enumerate(shown) if line.endswith("(small)"))
    rows = [line.split()[0] for line in shown[head:] if line and line[0].isalnum()]
    assert {"zero-shot", "hificl"} <= set(rows) and f"report: {project.folder / 'reports/index.html'}" in shown[head:]
    assert "\x1b" not in done.stderr
    after = when_done(project)
    others = before.keys() - {key}
    assert {name: after[name] for name in others} == {name: before[name] for name in others}
    assert len(after) == len(before) + 1
    again = trials(project)
    for end in (again[key], ends[key]):
        del end["keeping_seconds"], end["check"]  # the last checkpoint does not know how long it took itself
    assert {name: again[name] for name in ends} == ends
    assert checkpoints and {p: p.stat().st_mtime_ns for p in folder.glob("checkpoint/*/state.json")} == checkpoints
    assert query(project, "select count(*) from runs where status='RUNNING'") == [(0,)]
    metrics = project.python("-m", "dvc", "metrics", "show")
    assert "vqav2" in metrics.stdout


def test_a_field_that_does_not_exist_is_named(project):
    project.change(lambda raw: raw["studies"]["small"]["methods"]["hificl"]["search"].update(rnak=[1]))
    try:
        done = project.python("-m", "stages.train", check=False)
    finally:
        project.change(lambda raw: raw["studies"]["small"]["methods"]["hificl"]["search"].pop("rnak"))
    assert done.returncode == 2
    line = done.stderr.strip().splitlines()[-1]
    assert "rnak" in line and "rank" in line and "studies.small" in line


def test_a_tracking_store_out_of_reach_stops_before_any_work(project):
    before = when_done(project)
    done = project.python("-m", "pipeline", "sweep", "--set", "tracking.uri=http://127.0.0.1:9", check=False)
    assert done.returncode == 2 and "127.0.0.1:9" in done.stderr and when_done(project) == before


def test_evaluate_fails_where_a_cell_has_no_number(project, tmp_path):
    copy = copied(project, tmp_path / "copy")
    config = next(p for p in (copy.folder / "runs").glob("*/config.json") if '"mimic"' in p.read_text())
    shutil.rmtree(config.parent)
    done = copy.python("-m", "stages.evaluate", check=False)
    assert done.returncode == 1, done.stderr
    line = done.stderr.strip().splitlines()[-1]
    assert "1 of 4 cells have no number" in line and "small/idefics2-8b-base/vqav2/mimic" in line
    study = json.loads((copy.folder / "evaluations/studies/small.json").read_text())
    assert Counter(cell["status"] for cell in study["cells"]) == {"done": 3, "failed": 1}


def test_a_killed_sweep_goes_on_without_training_twice(tmp_path):
    """The core of `make test-faults`, where every kind of fault is injected."""
    project = make_project(tmp_path / "project", slots=1, pack=1)
    project.change(lambda raw: raw["studies"]["small"]["methods"]["hificl"]["search"].update(rank=[1, 2, 3, 4]))
    project.draw("vqav2")
    running = project.start("-m", "stages.train")
    deadline = time.monotonic() + 400
    while len(trials(project)) < 2 and running.poll() is None and time.monotonic() < deadline:
        time.sleep(0.2)
    os.kill(running.pid, signal.SIGKILL)
    assert running.wait(120) != 0
    before = when_done(project)
    assert 2 <= len(before) < 7, (project.folder / "started.log").read_text()
    project.python("-m", "stages.train")
    after = when_done(project)
    assert {key: after[key] for key in before} == before and len(after) == 7
    assert query(project, "select count(*) from runs where status='RUNNING'") == [(0,)]
    twice = "select count(*) from (select 1 from metrics group by run_uuid,key,step having count(*)>1)"
    assert query(project, twice) == [(0,)]
    assert (
        sorted(n for (n,) in query(project, "select count(*) from metrics where key='train_loss' group by run_uuid"))
        == [2] * 5
    )
