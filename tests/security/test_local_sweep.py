"""A sweep on one machine: it asks for a token, and listens to this machine alone."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from pipeline.core.errors import InputError
from pipeline.pool import ensure_token
from tests.conftest import ROOT
from tests.support.free_port import free_port


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
import json, os, pickle, subprocess, sys, time
from pathlib import Path
import psutil
from pipeline.config.load import Sweep
from pipeline.pool import cluster
import ray
with cluster.running(Sweep()):
    from pipeline.pool.cluster import code_version
    from pipeline.pool.slot import Worker
    workers = [Worker.remote(rank, 2, 0.0) for rank in range(2)]
    meeting = ray.get([worker.meeting.remote(True) for worker in workers])[0]
    ray.get([worker.connect.remote(meeting, code_version(), os.getcwd(), 2) for worker in workers])
    request = pickle.loads(Path(sys.argv[1]).read_bytes())
    ray.get([worker.admit.remote(request) for worker in workers])
    epoch = [worker.advance.remote() for worker in workers]
    while not ray.get(workers[0].steps.remote()):
        time.sleep(0.05)
    training = not ray.wait(epoch, num_returns=2, timeout=0)[0]
    me = psutil.Process()
    family = [me, *me.children(recursive=True)]
    listening = {}
    for one in family:
        for socket in one.net_connections("tcp"):
            if socket.status == psutil.CONN_LISTEN:
                listening[f"{socket.laddr.ip} {socket.laddr.port}"] = one.name()
    ports = sorted({int(place.split()[1]) for place in listening})
    knock = [*json.loads(sys.argv[2]), *map(str, ports)]
    reached = subprocess.run(knock, capture_output=True, text=True, check=True).stdout
    ray.get(epoch)
    arguments = [" ".join(one.cmdline()) for one in family]
    stranger = subprocess.run(
        [sys.executable, "-c", "import sys, ray; ray.init(address=sys.argv[1], log_to_driver=False)",
         ray.get_runtime_context().gcs_address],
        env={**os.environ, "RAY_AUTH_TOKEN": "f" * 64}, capture_output=True, text=True, timeout=120, check=False)
    session = ray._private.worker._global_node.get_session_dir_path()
    logs = "".join(p.read_text(errors="replace") for p in Path(session, "logs").rglob("*") if p.is_file())
print(json.dumps({"listening": listening, "arguments": arguments, "stranger": stranger.returncode, "training": training,
                  "reached": json.loads(reached), "why": stranger.stderr[-3000:], "logs": logs}))
"""
KNOCK = """
import json, socket, sys
reached = []
for address in json.loads(sys.argv[1]):
    for port in map(int, sys.argv[2:]):
        with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as knock:
            knock.settimeout(2)
            if knock.connect_ex((address, port)) == 0:
                reached.append([address, port])
print(json.dumps(reached))
"""


def outer_addresses() -> list[str]:
    """Return this machine's addresses but those of loopback and of one link."""
    every = [
        entry.address for entries in psutil.net_if_addrs().values() for entry in entries if entry.family in FAMILIES
    ]
    return [address for address in every if not address.startswith(("127.", "::1", "fe80"))]


FAMILIES = (socket.AF_INET, socket.AF_INET6)


@pytest.fixture
def knock() -> Iterator[list[str]]:
    """The command that connects to ports of this machine from another one, as far as its network goes.

    From a network namespace, where that may be made; else from here, by the outer addresses.
    """
    name, here, there = f"hificl{os.getpid()}", "10.231.77.1", "10.231.77.2"
    made = os.geteuid() == 0 and shutil.which("ip") and not _ip("netns", "add", name).returncode
    try:
        if (
            made
            and not _ip("link", "add", "hificl0", "type", "veth", "peer", "name", "hificl1", "netns", name).returncode
        ):
            for words in (["addr", "add", f"{here}/30", "dev", "hificl0"], ["link", "set", "hificl0", "up"]):
                _ip(*words)
            for words in (["addr", "add", f"{there}/30", "dev", "hificl1"], ["link", "set", "hificl1", "up"]):
                _ip("-n", name, *words)
            yield ["ip", "netns", "exec", name, sys.executable, "-c", KNOCK, json.dumps([here])]
        else:
            yield [sys.executable, "-c", KNOCK, json.dumps(outer_addresses())]
    finally:
        if made:
            _ip("netns", "del", name)


def _ip(*words: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(["ip", *words], capture_output=True, check=False)


def test_the_knock_reaches_what_listens_on_every_interface(knock):
    """Else the test below would prove nothing."""
    with socket.create_server(("", 0)) as open_one, socket.create_server(("127.0.0.1", 0)) as closed:
        ports = [server.getsockname()[1] for server in (open_one, closed)]
        done = subprocess.run([*knock, *map(str, ports)], capture_output=True, text=True, check=True)
    assert [port for _, port in json.loads(done.stdout)] == ports[:1] * len(json.loads(knock[-1]))


@pytest.mark.timeout(600)
def test_a_running_sweep_listens_on_loopback_and_refuses_strangers(home, trial, tmp_path, knock):
    request = trial("lora", tmp_path / "runs", rank=2, epochs=1, num_train_samples=16, micro_batch_size=1, world_size=2)
    (tmp_path / "request").write_bytes(pickle.dumps(replace(request, pack_key=None)))
    done = subprocess.run(
        [sys.executable, "-c", SWEEP, str(tmp_path / "request"), json.dumps(knock)], cwd=ROOT, capture_output=True,
        text=True, timeout=500, check=False, env={**os.environ, "HOME": str(home)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    seen = json.loads(done.stdout.splitlines()[-1])
    addresses = {one.split()[0].removeprefix("::ffff:") for one in seen["listening"]}
    assert addresses == {"127.0.0.1"}, seen["listening"]
    assert seen["training"] and seen["reached"] == []
    assert {"gcs_server", "raylet", "ray::Worker"} <= {name.split(".")[0] for name in seen["listening"].values()}
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


@pytest.mark.parametrize("given", [None, "of-the-environment"])
def test_the_mlflow_servers_password_is_in_its_file_or_the_environment_alone(home, monkeypatch, given):
    from pipeline.tracking import server

    started = []
    monkeypatch.setattr(server.subprocess, "run", lambda command, env, **_: started.append((command, env)))
    monkeypatch.delenv("MLFLOW_TRACKING_PASSWORD", raising=False)
    if given:
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", given)
    server.start(home / "t", host="127.0.0.1", port=free_port(), database=None, artifacts=None, detach=False)
    ((command, environment),) = started
    file = home / "t/password"
    password = given or file.read_text()
    assert environment["MLFLOW_AUTH_ADMIN_PASSWORD"] == password and len(password) > 16
    assert password not in " ".join(command) and file.exists() is (given is None)
    assert {mode(path) for path in (file, home / ".mlflow/credentials") if path.exists()} == {0o600}


def test_a_job_is_not_submitted_with_a_password_in_the_stores_address(monkeypatch):
    from pipeline.pool import cluster

    monkeypatch.setattr(cluster, "_client", lambda: None)  # a job would be asked of it
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://admin:hunter2@127.0.0.1:5000")
    with pytest.raises(InputError, match="an address with a password") as refused:
        cluster.submit([])
    assert "hunter2" not in str(refused.value)


def test_a_password_in_an_address_is_refused_before_anything_sees_it(home, monkeypatch):
    from pipeline.pool.cluster import refuse_password
    from pipeline.tracking.server import start

    database = "postgresql+psycopg://mlflow:hunter2@127.0.0.1/mlflow"
    with pytest.raises(InputError, match="pgpass") as first:
        start(home / "t", host="127.0.0.1", port=5999, database=database, artifacts=None, detach=True)
    with pytest.raises(InputError, match="credentials") as second:
        refuse_password("http://admin:hunter2@127.0.0.1:5000")
    assert "hunter2" not in str(first.value) + str(second.value)


@pytest.mark.parametrize(
    "address", ["https://admin:hunter2@mlflow.example.org", "postgresql://mlflow:hunter2@db/mlflow"]
)
def test_a_password_in_params_is_refused_and_one_in_the_environment_is_shown_nowhere(home, monkeypatch, address):
    from pipeline.config.load import load
    from pipeline.report.page import ui_address
    from pipeline.tracking import store
    from pipeline.tracking.client import Tracker

    with pytest.raises(InputError, match="tracking.uri: has a password in it") as refused:
        load(ROOT / "params.yaml", overrides=[f"tracking.uri={address}"])
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    shown = [str(refused.value), Tracker(None, home).address, store.shown(address)]
    params = load(ROOT / "params.yaml")
    shown.append(
        ui_address(params.model_copy(update={"tracking": params.tracking.model_copy(update={"uri": address})}))
    )
    assert "hunter2" not in "".join(shown)
    assert shown[-1] == ("https://mlflow.example.org" if address.startswith("https") else "")
