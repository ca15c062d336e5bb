"""The store behind `Tracker`: several processes at once, one that was killed, and stores that cannot be used."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import InputError
from pipeline.tracking.runs import FINISHED, KILLED, Tracker
from tests.conftest import ROOT
from tests.tracking.conftest import ask, statuses

KILLED_CHILD = """
import sys, time
from pipeline.tracking.runs import Tracker
tracker = Tracker(None, sys.argv[1])
parent = tracker.open_sweep("study", tags={"sweep_key": "s1"}, description="")
tracker.open_trial("study", parent, key="abc", name="n", params={}, datasets=[], tags={})
print("open", flush=True)
time.sleep(600)
"""

WRITERS = """
import os, sys
import mlflow.store.tracking.sqlalchemy_store  # once, for all four: the imports take seconds
from pipeline.tracking.runs import Tracker
root, parent = sys.argv[1:]
children = []
for number in range(4):
    child = os.fork()
    if child == 0:
        tracker = Tracker(None, root)
        run = tracker.open_trial("study", parent, key=f"key{number}", name="n", params={}, datasets=[], tags={})
        for epoch in range(10):
            tracker.log_epochs(run, [{"epoch": epoch, "loss": 1.0, "score": 2.0}])
        tracker.close_all("FINISHED")
        os._exit(0)
    children.append(child)
sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children))
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
        assert tracker.sweep_leftovers() == 0
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    mine = tracker.open_sweep("study", tags={"sweep_key": "mine"}, description="")
    assert tracker.sweep_leftovers() == 2
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


def test_a_file_that_is_no_database_is_named_and_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "mlflow.db"
    file.write_text("not a database, but surely somebody's file" * 100)
    with pytest.raises(InputError, match="not a database"):
        Tracker("sqlite:///mlflow.db", tmp_path).prepare(["study"])
    assert file.read_text().startswith("not a database, but")


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
