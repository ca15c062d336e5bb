"""`Tracker` on a real SQLite store."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import pytest

from pipeline.core.errors import InputError, WorkError
from pipeline.lineage.run_record import read_record
from pipeline.records.trial import Provenance
from pipeline.report.mlflow_report import Reporter, TableNumber
from pipeline.tracking.client import Tracker
from pipeline.tracking.records import FAILED, FINISHED, KILLED, TrialRunStart
from pipeline.tracking.registry import log_adapter
from tests.tracking.conftest import ask, open_both, points, statuses

STEPS_TWICE = "select key, step from metrics group by run_uuid, key, step having count(*) > 1"


def test_a_trial_is_a_child_with_commit_inputs_and_parameters(tracker: Tracker, root: Path) -> None:
    parent, child = open_both(tracker, options={"alpha": 1}, weight=None)
    tracker.log_metrics(child, points({"epoch": 0, "loss": 2.0}, {"epoch": 1, "loss": 1.0, "score": 50.0}))
    tracker.close(child, FINISHED)
    tracker.close_all(FINISHED)
    record = tracker.read_run(child)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=True)
    assert record.params == {"rank": "8", "options": '{"alpha": 1}', "weight": "null"}
    assert record.tags["mlflow.source.git.commit"] == commit.stdout.strip()
    assert record.tags["mlflow.parentRunId"] == parent
    assert (
        record.tags
        | {
            "git.dirty": "false",
            "profile": "mini",
            "study": "study",
            "trial_key": "abc",
            "mlflow.runName": "hificl vqa",
        }
        == record.tags
    )
    assert record.metrics == {"loss": 1.0, "score": 50.0}
    (dataset,) = record.inputs
    assert len(dataset.digest) == 12 and "d" * 64 in dataset.source
    assert dataset.context == "train"
    assert statuses(root) == {parent: FINISHED, child: FINISHED}


def test_a_resumed_sweep_goes_on_in_its_own_runs_and_logs_no_step_twice(tracker: Tracker, root: Path) -> None:
    first = open_both(tracker)
    tracker.log_metrics(first[1], points({"epoch": 0, "loss": 3.0}, {"epoch": 1, "loss": 2.0}))
    tracker.close_all(KILLED)
    again = Tracker(None, root)
    second = open_both(again, rank=8, added=1)
    assert second == first
    assert statuses(root) == dict.fromkeys(first, "RUNNING")
    rows = [{"epoch": 1, "loss": 2.0}, {"epoch": 2, "loss": 1.0}]
    again.log_metrics(second[1], points(*rows))
    again.log_metrics(second[1], points(*rows))
    again.close_all(FINISHED)
    assert ask(root, STEPS_TWICE) == []
    assert ask(root, "select step, value from metrics where key = 'loss' order by step") == [(0, 3), (1, 2), (2, 1)]
    assert again.read_run(first[1]).params == {"rank": "8", "added": "1"}
    assert ask(root, "select count(*) from inputs") == [(1,)]
    assert statuses(root) == dict.fromkeys(first, FINISHED)


def test_another_tracker_asks_the_store_which_steps_there_are(tracker: Tracker, root: Path) -> None:
    _, child = open_both(tracker)
    tracker.log_metrics(child, points({"epoch": 0, "loss": 3.0}))
    Tracker(None, root).log_metrics(child, points({"epoch": 0, "loss": 3.0}, {"epoch": 1, "loss": 2.0}))
    assert ask(root, "select step from metrics order by step") == [(0,), (1,)]


def test_sweeps_of_other_keys_and_studies_are_other_runs(tracker: Tracker) -> None:
    parents = {
        tracker.open_sweep(study, tags={"sweep_key": key}, description="")
        for study in ("study", "other")
        for key in ("s1", "s2", "")
    }
    children = {tracker.open_trial("study", parent, TrialRunStart(key="abc", name="n")) for parent in parents}
    assert len(parents) == len(children) == 6


def test_close_ends_once_and_keeps_the_error(tracker: Tracker, root: Path) -> None:
    parent, child = open_both(tracker)
    tracker.close(child, FAILED, error="the loss became NaN")
    tracker.close(child, FINISHED)
    tracker.close_all(KILLED)
    assert statuses(root) == {parent: KILLED, child: FAILED}
    assert tracker.read_run(child).tags["error"] == "the loss became NaN"
    with pytest.raises(ValueError, match="RUNNING"):
        tracker.close(child, "RUNNING")


def test_the_adapter_is_a_logged_model_kept_once(tracker: Tracker, root: Path, tmp_path: Path) -> None:
    _, child = open_both(tracker)
    folder = tmp_path / "adapter"
    folder.mkdir()
    with pytest.raises(WorkError, match="no adapter files"):
        log_adapter(tracker, child, folder)
    (folder / "adapter_config.json").write_text("{}")
    log_adapter(tracker, child, folder)
    log_adapter(tracker, child, folder)
    model = tracker.read_run(child).tags["adapter_model_id"]
    assert ask(root, "select model_id, source_run_id from logged_models") == [(model, child)]
    assert [file.name for file in (root / "mlartifacts").rglob("adapter_config.json")] == ["adapter_config.json"]


def test_an_evaluation_is_logged_once_and_another_score_becomes_the_next_step(tracker: Tracker, root: Path) -> None:
    _, child = open_both(tracker)
    tracker.close(child, FINISHED)
    file = root / "e.json"
    file.write_text("{}")
    for score in (81.0, 81.0, 82.0, 82.0):
        tracker.log_scores(child, {"accuracy": score, "CIDEr": None}, file)
    assert ask(root, "select step, value from metrics order by step") == [(0, 81.0), (1, 82.0)]
    assert tracker.read_run(child).metrics == {"accuracy": 82.0}
    assert len(list((root / "mlartifacts").rglob("evaluation/e.json"))) == 1


def test_find_run_prefers_a_finished_one(tracker: Tracker) -> None:
    _, done = open_both(tracker)
    tracker.close(done, FINISHED)
    other = tracker.open_sweep("study", tags={"sweep_key": "s2"}, description="")
    tracker.open_trial("study", other, TrialRunStart(key="abc", name="n"))
    assert tracker.find_run("abc") == done
    assert tracker.find_run("unknown") is None


def test_an_unknown_run_is_an_input_error(tracker: Tracker) -> None:
    with pytest.raises(InputError, match="no run 'beef'.*`hificl trace` names"):
        tracker.read_run("beef")


def test_a_run_is_looked_for_in_a_store_that_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who only looks makes none."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(InputError, match="mlflow.db: no MLflow store. Run `make repro`"):
        read_record(Tracker(None, tmp_path), "beef")
    assert not (tmp_path / "mlflow.db").exists()


def test_a_trials_run_whose_record_was_changed_is_refused(tracker: Tracker) -> None:
    _, child = open_both(tracker)
    tracker.close(child, FINISHED)
    for tags in ({"trial_config": "{"}, {"trial_config": "[]"}, {"trial_key": "other"}):
        tracker.tag(child, tags)
        with pytest.raises(InputError, match=f"{child}: (its configuration is damaged|the run's params do not give)"):
            read_record(tracker, child)


def test_uncommitted_changes_are_kept_with_the_sweep(root: Path) -> None:
    (root / ".gitignore").write_text("ml*\nedited\n")
    (root / "new.py").write_text("a new file\n")
    tracker = Tracker(None, root)
    for run_id in open_both(tracker):
        tracker.close(run_id, FINISHED)
        assert tracker.read_run(run_id).tags["git.dirty"] == "true"
        diff = tracker.provenance_of(run_id).diff
        assert "+edited" in diff
        assert "a new file" not in diff  # it may hold a secret: git does not know it


def test_a_trial_that_is_found_done_keeps_the_commit_that_made_it(tracker: Tracker, root: Path) -> None:
    parent, _ = open_both(tracker)
    made_by = Provenance(commit="c" * 40, dirty=True, diff="a diff")
    child = tracker.open_trial("study", parent, TrialRunStart(key="old", name="n", made_by=made_by))
    assert tracker.read_run(child).tags["mlflow.source.git.commit"] == "c" * 40
    assert tracker.provenance_of(child) == made_by


def test_system_metrics_stop_with_the_run(tracker: Tracker, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.2")
    parent = tracker.open_sweep("study", tags={"sweep_key": "s"}, description="", system_metrics=True)
    query = "select count(*) from metrics where key like 'system/%'"
    deadline = time.monotonic() + 20
    while ask(root, query) == [(0,)] and time.monotonic() < deadline:
        time.sleep(0.1)
    tracker.close(parent, FINISHED)
    count = ask(root, query)
    assert count > [(0,)]
    time.sleep(0.6)
    assert ask(root, query) == count


def test_a_report_is_kept_once_and_its_runs_know_their_places(tracker: Tracker, root: Path, tmp_path: Path) -> None:
    parent, child = open_both(tracker)
    tracker.log_scores(child, {"test_accuracy": 50.0}, None)
    folder = tmp_path / "report"
    folder.mkdir()
    (folder / "study.html").write_text("<p>a table")
    shown = [TableNumber(child, "01 HiFICL", "1 vqa", 50.0), TableNumber(child, "02 the same trial", "1 vqa", 50.0)]
    assert Reporter(tracker).log("study", folder, shown, {"hificl rank=8/vqa": 50.0})
    assert not Reporter(tracker).log("study", folder, shown, {"hificl rank=8/vqa": 50.0})
    assert tracker.artifacts_of(parent, "report") == ["report/study.html"]
    tags = tracker.read_run(child).tags
    assert (tags["table.row"], tags["table.column"]) == ("01 HiFICL", "1 vqa")
    assert tracker.read_run(child).metrics["table_value"] == 50.0
    assert tracker.read_run(parent).metrics == {"report/hificl rank-8/vqa": 50.0}
    note = tracker.read_run(parent).tags["mlflow.note.content"]
    assert note.startswith("a sweep") and f"runs/{parent}/artifacts/report/study.html" in note
    (folder / "study.html").write_text("<p>another table")
    changed = [TableNumber(child, "01 HiFICL", "1 vqa", 60.0)]
    assert Reporter(tracker).log("study", folder, changed, {"hificl rank=8/vqa": 60.0})
    assert tracker.read_run(child).metrics["table_value"] == 60.0
    (folder / "study.html").write_text("<p>a table without it")
    assert Reporter(tracker).log("study", folder, [], {})
    assert "table.row" not in tracker.read_run(child).tags
    assert not Reporter(tracker).log("nothing-of-it", folder, [], {})
