"""The MLflow server goes away during a sweep, for a while and for good, and while trials are scored."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from tests.faults.checks import mlflow_problems, nothing_left, results, survived
from tests.faults.sweeps import EPOCHS, MARK, set_tracking
from tests.support.free_port import free_port

pytestmark = [pytest.mark.faults, pytest.mark.timeout(900)]


class Server:
    """A real `mlflow server` on loopback with an SQLite file behind it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.database = folder / "server.db"
        self.uri = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen | None = None

    def start(self) -> None:
        words = [
            "server", "--host", "127.0.0.1", "--port", str(self.port), "--workers", "1",
            "--backend-store-uri", f"sqlite:///{self.database}",
            "--artifacts-destination", str(self.folder / "artifacts"), "--serve-artifacts",
        ]  # fmt: skip
        with (self.folder / "server.log").open("a") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "mlflow", *words], stdout=log, stderr=log, start_new_session=True,
                env={k: v for k, v in os.environ.items() if k != MARK},
            )  # fmt: skip
        deadline = time.monotonic() + 180
        while time.monotonic() < deadline:
            try:
                with urllib.request.urlopen(f"{self.uri}/health", timeout=2):
                    return
            except OSError:
                time.sleep(0.2)
        raise AssertionError((self.folder / "server.log").read_text()[-2000:])

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


@pytest.fixture
def server(tmp_path: Path):
    made = Server(tmp_path)
    made.start()
    yield made
    made.stop()


def test_away_for_a_while(sweep, reference, fault, server):
    set_tracking(sweep, uri=server.uri)
    sweep.begin()
    sweep.midway()
    server.stop()
    done = len(sweep.ends())
    sweep.until(lambda: len(sweep.ends()) > done and "store is away" in sweep.log, "training goes on")
    server.start()
    assert sweep.ended() == 0, sweep.log
    survived(sweep, reference, server.database)
    assert sweep.log.count("the MLflow store is away") == 1 and "answers again and has everything" in sweep.log
    fault("away")


def test_away_for_good(sweep, reference, fault, server):
    set_tracking(sweep, uri=server.uri, patience_seconds=2)
    sweep.begin()
    sweep.midway()
    server.stop()
    assert sweep.ended() == 1
    last = sweep.log.strip().splitlines()[-1]
    assert last.startswith(f"error: {server.uri}") and str(sweep.runs) in last and "metrics" in last
    assert results(sweep) == reference["results"]  # all are trained
    nothing_left(sweep)
    ends = dict.fromkeys(reference["results"], "FINISHED")
    assert mlflow_problems(server.database, ends, EPOCHS)  # it does not have them yet
    sweep.remember()
    server.start()
    sweep.again()
    assert "4 are done" in sweep.log
    survived(sweep, reference, server.database)
    fault("gone")


def test_away_while_it_scores(sweep, reference, fault, server):
    set_tracking(sweep, uri=server.uri, patience_seconds=2)
    sweep.again()
    sweep.remember()
    scores = sweep.folder / "evaluations"
    sweep.begin("-m", "stages.evaluate")
    sweep.until(lambda: list(scores.glob("*.json")), "a score is written")
    server.stop()
    assert sweep.ended() == 1
    last = sweep.log.strip().splitlines()[-1]
    assert last.startswith(f"error: {server.uri}") and "evaluations" in last
    written = {path: json.loads(path.read_text()) for path in scores.glob("*.json")}
    assert len(written) == 3 and all(record["run_id"] for record in written.values())  # one of the two ranks is chosen
    before = {path: path.stat().st_mtime_ns for path in written}
    nothing_left(sweep)
    server.start()
    sweep.again("-m", "stages.evaluate")
    assert {path: path.stat().st_mtime_ns for path in scores.glob("*.json")} == before  # nothing is scored twice
    with sqlite3.connect(f"file:{server.database}?mode=ro", uri=True) as db:
        logged = "select m.run_uuid, m.value from metrics m where m.key = ?"
        for record in written.values():
            rows = dict(db.execute(logged, (f"test_{record['metric']}",)).fetchall())
            assert rows[record["run_id"]] == pytest.approx(record["value"], rel=1e-5)
        versions = db.execute("select value from model_version_tags where key = 'trial_key'").fetchall()
        assert sorted(key for (key,) in versions) == sorted(record["trial"] for record in written.values())
    survived(sweep, reference, server.database)
    fault("scoring away")
