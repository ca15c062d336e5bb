"""The store behind `Tracker`: several processes at once, one that was killed, and stores that cannot be used."""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from pipeline.commands import doctor
from pipeline.config.load import load
from pipeline.core.errors import InputError
from pipeline.tracking import server, store
from pipeline.tracking.client import Tracker
from pipeline.tracking.records import FINISHED, KILLED, MetricPoint, TrialRunStart
from pipeline.tracking.registry import log_adapter
from tests.conftest import ROOT
from tests.support import odd_paths
from tests.support.free_port import free_port
from tests.tracking.conftest import ask, checkout, open_both, points, statuses

KILLED_CHILD = """
import sys, time
from pipeline.tracking.client import Tracker
from pipeline.tracking.records import TrialRunStart
tracker = Tracker(None, sys.argv[1])
parent = tracker.open_sweep("study", tags={"sweep_key": "s1"}, description="")
tracker.open_trial("study", parent, TrialRunStart(key="abc", name="n"))
print("open", flush=True)
time.sleep(600)
"""

WRITERS = """
import os, sys
import mlflow.store.tracking.sqlalchemy_store  # once, for all four: the imports take seconds
from pipeline.tracking.client import Tracker
from pipeline.tracking.records import MetricPoint, TrialRunStart
root, parent = sys.argv[1:]
children = []
for number in range(4):
    child = os.fork()
    if child == 0:
        tracker = Tracker(None, root)
        run = tracker.open_trial("study", parent, TrialRunStart(key=f"key{number}", name="n"))
        for epoch in range(10):
            tracker.log_metrics(run, [MetricPoint("loss", epoch, 1.0), MetricPoint("score", epoch, 2.0)])
        tracker.close_all("FINISHED")
        os._exit(0)
    children.append(child)
sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children))
"""

KILLED_MAKER = """
import os, signal, sys
import sqlalchemy

@sqlalchemy.event.listens_for(sqlalchemy.engine.Engine, "after_cursor_execute")
def executed(connection, cursor, statement, *_):
    if "ADD COLUMN" in statement:  # of a migration, whose version is written behind it
        os.kill(os.getpid(), signal.SIGKILL)

from pipeline.tracking.client import Tracker
Tracker(None, sys.argv[1]).prepare([])
"""


def start(code: str, *arguments: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@pytest.mark.slow
def test_what_a_killed_process_left_open_is_ended_and_a_living_ones_is_not(tracker: Tracker, root: Path) -> None:
    process = start(KILLED_CHILD, root)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "open\n"
        assert tracker.end_leftovers() == 0
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    mine = tracker.open_sweep("study", tags={"sweep_key": "mine"}, description="")
    assert tracker.end_leftovers() == 2
    assert sorted(statuses(root).values()) == [KILLED, KILLED, "RUNNING"]
    assert statuses(root)[mine] == "RUNNING"


@pytest.mark.slow
def test_four_processes_write_children_at_once(tracker: Tracker, root: Path) -> None:
    parent = tracker.open_sweep("study", tags={"sweep_key": "s1"}, description="")
    assert start(WRITERS, root, parent).wait(timeout=300) == 0
    tracker.close_all(FINISHED)
    assert ask(root, "select count(*) from metrics") == [(80,)]
    assert set(statuses(root).values()) == {FINISHED}
    assert len(statuses(root)) == 5


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("http://127.0.0.1:{port}", ["http://127.0.0.1", "refused", "mlflow server"]),
        ("file:/tmp/mlruns", ["plain files", "sqlite:///mlflow.db"]),
        ("nonsense://x", ["nonsense", "mlflow.db"]),
        ("sqlite:///no_folder_here/is_a_file/mlflow.db", ["is_a_file", "can be written"]),
    ],
)
def test_an_unreachable_store_is_said_at_once(tmp_path: Path, uri: str, words: list[str]) -> None:
    (tmp_path / "no_folder_here").write_text("a file")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        uri = uri.format(port=free.getsockname()[1])
    began = time.monotonic()
    with pytest.raises(InputError) as caught:
        Tracker(uri, tmp_path).prepare(["study"])
    assert time.monotonic() - began < 10
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.slow
def test_a_store_whose_making_was_interrupted_begins_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MLflow itself says of its file for ever that a column or a table is there already."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert start(KILLED_MAKER, tmp_path).wait(timeout=300) == -signal.SIGKILL
    params = load(ROOT / "params.yaml")
    assert "its making has not ended" in next(doctor._mlflow(params, tmp_path)).detail
    Tracker(None, tmp_path).prepare(["study"])
    assert ("study",) in ask(tmp_path, "select name from experiments")
    assert not list(tmp_path.glob("*.making"))
    (check,) = doctor._mlflow(params, tmp_path)
    assert check.state == doctor.OK and check.detail.endswith("/mlflow.db")


def test_a_store_that_holds_a_run_is_never_begun_anew(tracker: Tracker, root: Path) -> None:
    parent, _ = open_both(tracker)
    (root / "mlflow.db.making").touch()
    assert Tracker(None, root).read_run(parent).run_id == parent


def test_who_keeps_a_store_from_being_opened_is_named(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(store, "_LOCK_SECONDS", 0.2)
    with (root / "mlflow.db.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        holder = f"held by another process, pid {os.getpid()}"
        with pytest.raises(InputError, match=f"mlflow.db.lock is {holder}.*Wait for it to end"):
            Tracker(None, root).prepare([])
    assert f"waiting 0.2 s at most for {root / 'mlflow.db'}, {holder}\n" in capsys.readouterr().err


def test_a_file_that_is_no_database_is_named_and_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "mlflow.db"
    file.write_text("not a database, but surely somebody's file" * 100)
    with pytest.raises(InputError, match="not a database"):
        Tracker("sqlite:///mlflow.db", tmp_path).prepare(["study"])
    assert file.read_text().startswith("not a database, but")


def test_a_store_that_fails_in_the_middle_is_an_error_and_no_traceback(tracker: Tracker, root: Path, capfd) -> None:
    parent = tracker.open_sweep("study", tags={"sweep_key": "s1"}, description="")
    run = tracker.open_trial("study", parent, TrialRunStart(key="abc", name="n"))
    with sqlite3.connect(root / "mlflow.db") as database:
        database.execute("alter table metrics rename to gone")
    with pytest.raises(store.StoreAway, match="no such table: metrics"):
        tracker.log_metrics(run, [MetricPoint("loss", 1, 1.0)])
    assert "Traceback" not in capfd.readouterr().err


def test_a_password_is_in_no_message(tmp_path: Path) -> None:
    uri = "postgresql+psycopg://user:hunter2@127.0.0.1:1/mlflow"
    with pytest.raises(InputError) as caught:
        Tracker(uri, tmp_path).prepare(["study"])
    assert "hunter2" not in str(caught.value)
    assert "127.0.0.1:1" in str(caught.value)


def test_files_go_where_the_setting_says(root: Path) -> None:
    Tracker(None, root, "elsewhere/files").prepare(["placed"])
    Tracker(None, root, "s3://bucket/path/").prepare(["in-s3"])
    places = dict(ask(root, "select name, artifact_location from experiments"))
    assert places["placed"] == (root / "elsewhere/files").as_uri() + "/placed"
    assert places["in-s3"] == "s3://bucket/path/in-s3"


@pytest.mark.parametrize("name", odd_paths.NAMES)
def test_the_store_and_its_files_lie_in_the_project_whatever_it_is_called(
    tmp_path: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / name).mkdir()
    root = checkout(tmp_path / name, empty_store)
    (root / "scores.json").write_text('{"a": 1}')
    (root / "adapter").mkdir()
    (root / "adapter/adapter_config.json").write_text("{}")
    began = time.monotonic()
    tracker = Tracker(None, root)
    tracker.prepare(["study"])
    assert time.monotonic() - began < 30
    _, child = open_both(tracker)
    tracker.log_metrics(child, points({"epoch": 0, "loss": 1.0}))
    log_adapter(tracker, child, root / "adapter")
    tracker.log_scores(child, {"score": 2.0}, root / "scores.json")
    tracker.close_all(FINISHED)
    assert store.sqlite_file(tracker.uri) == root / "mlflow.db"
    again = Tracker(tracker.uri, root)  # as an address that somebody wrote
    assert again.uri == tracker.uri
    assert again.read_run(child).metrics == {"loss": 1.0, "score": 2.0}
    copy = again.mlflow.download_artifacts(child, "evaluation/scores.json", str(root))
    assert Path(copy).read_text() == '{"a": 1}'
    kept = {path.name for path in (root / "mlartifacts").rglob("*") if path.is_file()}
    assert {"scores.json", "adapter_config.json", "provenance.json"} <= kept
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.slow
def test_a_server_keeps_its_things_in_a_folder_of_any_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    folder, port, root = tmp_path.joinpath("kept", *odd_paths.NAMES), free_port(), tmp_path / "project"
    root.mkdir()
    (root / "scores.json").write_text('{"a": 1}')
    before = set(psutil.Process().children(recursive=True))
    try:
        server.start(folder, host="127.0.0.1", port=port, database=None, artifacts=None, detach=True)
        tracker = Tracker(f"http://127.0.0.1:{port}", root)
        tracker.prepare(["study"])
        parent, _ = open_both(tracker)
        tracker.log_scores(parent, {"score": 2.0}, root / "scores.json")
        assert [one.path for one in tracker.mlflow.list_artifacts(parent, "evaluation")] == ["evaluation/scores.json"]
        tracker.close_all(FINISHED)
    finally:
        for process in set(psutil.Process().children(recursive=True)) - before:
            process.kill()
    assert {"mlflow.db", "auth.db", "password"} <= {path.name for path in folder.iterdir()}
    assert [path.name for path in (folder / "artifacts").rglob("*.json") if "evaluation" in path.parts] == [
        "scores.json"
    ]
    assert {path.name for path in tmp_path.iterdir()} == {"home", "kept", "project"}
