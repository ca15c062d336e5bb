"""A sweep on one machine: it asks for a token, and listens to this machine alone."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.core.errors import InputError
from pipeline.pool import ensure_token
from tests.conftest import ROOT


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_token_is_made_once_and_is_its_owners_alone(home):
    path = ensure_token()
    token = path.read_text()
    assert path == home / ".ray/auth_token" and mode(path) == 0o600 and len(token) == 64
    assert os.environ["RAY_AUTH_MODE"] == "token"
    path.chmod(0o644)  # as Ray's own generator leaves it
    assert ensure_token().read_text() == token and mode(path) == 0o600
    assert [file.name for file in path.parent.iterdir()] == ["auth_token"]


def test_who_says_otherwise_is_left_alone(home, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert ensure_token() is None
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "given")
    assert ensure_token() is None
    assert not (home / ".ray").exists()


SWEEP = """
import json, os, subprocess, sys
from pathlib import Path
import psutil
from pipeline.config.load import Sweep
from pipeline.pool import tuner
import ray
with tuner.cluster(Sweep()):
    from pipeline.pool.slot import Worker
    worker = Worker.remote(0, 1)
    ray.get(worker.address.remote())
    me = psutil.Process()
    family = [me, *me.children(recursive=True)]
    listening = {}
    for one in family:
        for socket in one.net_connections("tcp"):
            if socket.status == psutil.CONN_LISTEN:
                listening[f"{socket.laddr.ip} {socket.laddr.port}"] = one.name()
    arguments = [" ".join(one.cmdline()) for one in family]
    stranger = subprocess.run(
        [sys.executable, "-c", "import sys, ray; ray.init(address=sys.argv[1], log_to_driver=False)",
         ray.get_runtime_context().gcs_address],
        env={**os.environ, "RAY_AUTH_TOKEN": "f" * 64}, capture_output=True, text=True, timeout=120, check=False)
    session = ray._private.worker._global_node.get_session_dir_path()
    logs = "".join(p.read_text(errors="replace") for p in Path(session, "logs").rglob("*") if p.is_file())
print(json.dumps({"listening": listening, "arguments": arguments, "stranger": stranger.returncode,
                  "why": stranger.stderr[-3000:], "logs": logs}))
"""


def test_a_running_sweep_listens_on_loopback_and_refuses_strangers(home):
    done = subprocess.run(
        [sys.executable, "-c", SWEEP], cwd=ROOT, capture_output=True, text=True, timeout=400, check=False,
        env={**os.environ, "HOME": str(home)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    seen = json.loads(done.stdout.splitlines()[-1])
    addresses = {one.split()[0].removeprefix("::ffff:") for one in seen["listening"]}
    assert addresses == {"127.0.0.1"}, seen["listening"]
    assert {"gcs_server", "raylet"} <= set(seen["listening"].values())
    assert seen["stranger"] != 0 and "token" in seen["why"].lower(), seen["why"]
    token = (home / ".ray/auth_token").read_text()
    assert mode(home / ".ray/auth_token") == 0o600
    assert token not in seen["logs"] and not any(token in line for line in seen["arguments"])


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_the_mlflow_server_listens_to_no_whole_world(tmp_path, host):
    from pipeline.tracking.server import start

    with pytest.raises(InputError, match="every interface"):
        start(tmp_path / "t", host=host, port=5999, database=None, artifacts=None, detach=True)
    assert not (tmp_path / "t").exists()


def test_a_password_in_an_address_is_refused_before_anything_sees_it(home, monkeypatch):
    from pipeline.pool.ray_job import refuse_password
    from pipeline.tracking.server import start

    database = "postgresql+psycopg://mlflow:hunter2@127.0.0.1/mlflow"
    with pytest.raises(InputError, match="pgpass") as first:
        start(home / "t", host="127.0.0.1", port=5999, database=database, artifacts=None, detach=True)
    with pytest.raises(InputError, match="credentials") as second:
        refuse_password("http://admin:hunter2@127.0.0.1:5000")
    assert "hunter2" not in str(first.value) + str(second.value)
