"""The MLflow server goes away during a sweep, for a while and for good."""

from __future__ import annotations

import json
import os
import signal
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
    sweep.until(lambda: len(sweep.ends()) > done and list(sweep.runs.glob(".spool/*.jsonl")), "training goes on")
    server.start()
    assert sweep.ended() == 0, sweep.log
    survived(sweep, reference, server.database)
    assert "metrics wait in" in sweep.log and "entries of the spool" in sweep.log
    fault("away")


def test_away_for_good(sweep, reference, fault, server):
    set_tracking(sweep, uri=server.uri, patience_seconds=2)
    sweep.begin()
    sweep.midway()
    server.stop()
    assert sweep.ended() == 1
    (spool,) = sweep.runs.glob(".spool/*.jsonl")
    last = sweep.log.strip().splitlines()[-1]
    assert last.startswith(f"error: {server.uri}") and str(spool) in last and "metrics" in last
    assert results(sweep) == reference["results"]  # all are trained
    kept = [json.loads(line) for line in spool.read_text().splitlines()]
    assert server.uri in kept[0]["uri"] and {row["do"] for row in kept[1:]} >= {"log_epochs", "log_adapter", "close"}
    nothing_left(sweep)
    ends = dict.fromkeys(reference["results"], "FINISHED")
    assert mlflow_problems(server.database, ends, EPOCHS)  # it does not have them yet
    sweep.remember()
    server.start()
    sweep.again()
    assert "4 are done" in sweep.log
    survived(sweep, reference, server.database)
    fault("gone")
