"""`ray up`, `ray submit cluster.yaml sweep`, a node lost on the way, `ray down`: for real, over ssh.

The tests of this file go in order and share one cluster (conftest.py).
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.cluster.conftest import DATABASE_PASSWORD, Cluster, mode
from tests.cluster.lab import PATIENCE, Machine
from tests.conftest import ROOT

pytestmark = [pytest.mark.cluster, pytest.mark.e2e, pytest.mark.timeout(7200)]
LOOPBACK = "127.0.0.1"
EPOCHS = 4


@pytest.fixture(scope="module")
def up(cluster: Cluster) -> Cluster:
    def edit(raw):
        raw["profiles"]["tiny"]["train"]["epochs_below_1000"] = EPOCHS
        two = {"method": "hificl", "rank": 2, "world_size": 2, "micro_batch_size": 2, "accumulation": 1}
        raw["studies"]["small"]["methods"] = {
            "alone": {"method": "hificl", "search": {"rank": [1, 2]}},
            "zero-2": {**two, "zero_stage": 2},
            "zero-3": {**two, "zero_stage": 3},
        }

    cluster.project.change(edit)
    cluster.ray("up", "cluster.yaml", "--yes", "--no-config-cache")
    cluster.wait_for_nodes(3)
    return cluster


def test_what_listens_is_on_loopback_or_the_clusters_interface(up):
    head, worker = (dict_of(machine.listening()) for machine in (up.head, up.workers[0]))
    for port in (8265, 5000, 5432):  # dashboard, MLflow, PostgreSQL
        assert head[port] == {LOOPBACK}
    assert head[10001] <= {LOOPBACK, up.head.address}  # Ray's client server
    assert worker[52365] <= {LOOPBACK, up.workers[0].address}  # a node's agent
    everywhere = {port for port, hosts in head.items() if hosts & {"0.0.0.0", "::"}}
    # Ray gives its own gRPC ports no address to bind to. They ask for the token, and nothing that speaks HTTP is there.
    assert 6379 in everywhere
    for port in everywhere:
        said = up.laptop.run(
            "curl", "-s", "-m", "5", "--http1.1", f"http://{up.head.address}:{port}/metrics", check=False
        )
        assert said.returncode != 0, f"port {port} answers everybody: {said.stdout[:300]}"


def dict_of(sockets: list[tuple[str, int]]) -> dict[int, set[str]]:
    found: dict[int, set[str]] = {}
    for host, port in sockets:
        found.setdefault(port, set()).add(host)
    return found


def test_nobody_gets_in_without_token_or_password(up):
    code = "curl -s -o /dev/null -w %{http_code} "
    assert up.head.run("bash", "-c", code + "http://127.0.0.1:8265/api/jobs/").stdout == "401"
    assert up.head.run("bash", "-c", code + "http://127.0.0.1:5000/").stdout == "401"
    head = f"{up.head.address}:6379"
    stranger = up.laptop.run("ray", "status", "--address", head, check=False, PATH=up.path, RAY_AUTH_MODE="disabled")
    friend = up.laptop.run("ray", "status", "--address", head, check=False, PATH=up.path, RAY_AUTH_MODE="token")
    assert stranger.returncode != 0 and friend.returncode == 0, stranger.stdout + friend.stdout + friend.stderr
    for path in (".ray/auth_token", ".mlflow/credentials", ".hificl/tracking/password", ".pgpass"):
        assert mode(up.head.home / path) == 0o600, path


def test_a_node_with_other_code_is_named_and_nothing_is_started(up):
    worker = up.workers[1]
    other = up.lab.folder / "other-code"
    shutil.copytree(ROOT / "pipeline", other, ignore=shutil.ignore_patterns("__pycache__"))
    (other / "config/trial.py").write_text((other / "config/trial.py").read_text() + "\n# another version\n")
    worker.run("mount", "--bind", str(other), str(ROOT / "pipeline"))
    try:
        done = up.ray("submit", "cluster.yaml", "sweep", check=False)
    finally:
        worker.run("umount", str(ROOT / "pipeline"))
    said = done.stdout + done.stderr
    assert done.returncode != 0 and f"node {worker.address}: has code " in said
    assert "the sweep was started from code" in said and "Traceback" not in said
    assert not list((up.project.folder / "runs").glob("*/metrics.jsonl"))


@pytest.fixture(scope="module")
def swept(up: Cluster) -> Cluster:
    """A sweep whose connection is cut, whose follower goes away, and whose cluster loses a node and then its head."""
    log = up.lab.folder / "submit.log"
    submit = up.start("submit", "cluster.yaml", "sweep", log=log)
    wait(lambda: "is Ray job" in log.read_text(), "the job", log)
    os.killpg(submit.pid, signal.SIGKILL)  # the laptop is closed
    submit.wait()
    wait(lambda: list((up.project.folder / "runs").glob("*/metrics.jsonl")), "a first epoch", log)
    for pid in ray_processes(up.workers[0]):
        os.kill(pid, signal.SIGKILL)  # the node is gone, with all that ran on it
    wait_for_end_of_following(up)
    up.wait_for_nodes(3)  # Ray has started the node again
    wait(lambda: trains(up, world_size=2), "an epoch of a trial on two nodes", log)
    up.before = ends(up)
    lose_head(up)
    up.submitted = up.ray("submit", "cluster.yaml", "sweep", check=False, timeout=3 * PATIENCE)
    return up


def trains(up: Cluster, world_size: int) -> bool:
    """Return whether a trial of so many ranks has an epoch behind it and none of them has ended."""
    for path in (up.project.folder / "runs").glob("*/metrics.jsonl"):
        config = json.loads((path.parent / "config.json").read_text())["config"]
        if config["world_size"] == world_size and path.parent.name not in ends(up):
            return True
    return False


def ends(up: Cluster) -> dict[str, int]:
    """Return when each trial ended, by its file's time."""
    files = (up.project.folder / "runs").glob("*/done.json")
    return {path.parent.name: path.stat().st_mtime_ns for path in files}


def lose_head(up: Cluster) -> None:
    """Pull the head's plug, with Ray, the sweep, MLflow and PostgreSQL on it; have it boot, and `ray up` again."""
    up.head.kill()
    up.head.boot()
    up.postgres.start()
    up.postgres.query("select 1")
    up.ray("up", "cluster.yaml", "--yes", "--no-config-cache")
    up.wait_for_nodes(3)


def wait(condition, what: str, log: Path, seconds: float = PATIENCE) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"{what} did not come:\n{log.read_text()[-4000:]}")
        time.sleep(0.2)


def ray_processes(machine: Machine) -> list[int]:
    """Return the processes of Ray on a machine, by the ids that this side knows them by."""
    words = ("raylet", "ray::", "gcs_server", "/ray/dashboard")
    return [pid for pid, line in machine.processes().items() if any(word in line for word in words)]


def wait_for_end_of_following(up: Cluster) -> None:
    """Ctrl-C on `hificl sweep --attach` leaves the job alone, and says so."""
    log = up.lab.folder / "attach.log"
    line = "cd ~/hificl-lab && exec hificl sweep --attach"
    follower = up.head.start("bash", "-c", line, log=log, PATH=up.path, RAY_AUTH_MODE="token")
    wait(lambda: "trials:" in log.read_text(), "the job's log", log)
    group = subprocess.run(["pgrep", "-g", str(follower.pid)], capture_output=True, text=True, check=True).stdout
    for pid in set(map(int, group.split())) - {follower.pid}:  # nsenter itself only waits
        os.kill(pid, signal.SIGINT)
    assert follower.wait(timeout=PATIENCE) == 130, log.read_text()
    assert "goes on" in log.read_text() and "Traceback" not in log.read_text()


def test_the_sweep_ends_well_and_says_so_to_who_attaches(swept):
    said = swept.submitted.stdout + swept.submitted.stderr
    assert swept.submitted.returncode == 0, said[-6000:]
    assert "succeeded" in said
    assert 0 < len(swept.before) < 4  # the head was lost in the middle
    assert swept.before.items() <= ends(swept).items()  # what had ended was not touched
    again = swept.on_head("hificl", "sweep", "--attach")
    assert again.returncode == 0 and "succeeded" in again.stderr


def test_every_trial_is_finished_and_two_spanned_both_workers(swept):
    rows = {}
    for path in (swept.project.folder / "runs").glob("*/done.json"):
        config = json.loads((path.parent / "config.json").read_text())["config"]
        epochs = [json.loads(line) for line in (path.parent / "metrics.jsonl").read_text().splitlines()]
        rows[config["world_size"], config["zero_stage"], config["options"]["rank"]] = epochs
        assert json.loads(path.read_text())["status"] == "finished"
        assert {row["epoch"] for row in epochs} == set(range(1, EPOCHS + 1))
    assert rows.keys() == {(1, 0, 1), (1, 0, 2), (2, 2, 2), (2, 3, 2)}
    for two, three in zip(rows[2, 2, 2], rows[2, 3, 2], strict=True):
        assert two["train_loss"] == pytest.approx(three["train_loss"], abs=1e-4)
    # the workers have one processor each and the head none, so two ranks are on two nodes
    sizes = sorted(node["resources_total"].get("CPU", 0) for node in swept.alive())
    assert sizes == [0, 1, 1]


def test_mlflow_has_every_step_once_and_no_open_run(swept):
    query = swept.postgres.query
    assert query("select status, count(*) from runs group by status") == [["FINISHED", 5]]
    children = query("select run_uuid from tags where key='mlflow.parentRunId'")
    assert len(children) == 4
    double = "select 1 from metrics where key not like 'system/%' group by run_uuid, key, step having count(*) > 1"
    assert query(double) == []
    steps = query("select run_uuid, count(distinct step) from metrics where key='train_loss' group by run_uuid")
    assert sorted(count for _, count in steps) == [EPOCHS] * 4
    artifacts = swept.head.home / ".hificl/tracking/artifacts"
    assert len(list(artifacts.rglob("adapter_model.safetensors"))) == 4
    asked = swept.head.run("bash", "-c", "cat ~/.hificl/tracking/password | { read p; echo \"user = admin:$p\"; } |"
                           " curl -s -K - -o /dev/null -w %{http_code} http://127.0.0.1:5000/")  # fmt: skip
    assert asked.stdout == "200"  # what a browser behind an ssh tunnel sees


def test_no_secret_is_in_params_mlflow_logs_or_arguments(swept):
    tracking = swept.head.home / ".hificl/tracking"
    secrets = [
        swept.token, DATABASE_PASSWORD, (tracking / "password").read_text().strip(),
        (tracking / "session-key").read_text().strip(), swept.lab.key.read_text().splitlines()[1],
    ]  # fmt: skip
    places = [swept.project.folder / name for name in ("params.yaml", "runs")]
    places += [
        tracking / "artifacts",
        tracking / "server.log",
        swept.lab.folder / "submit.log",
        swept.lab.folder / "attach.log",
    ]
    places += [machine.folder / "ray" for machine in swept.lab.machines]
    looked = 0
    for file in (file for place in places for file in ([place] if place.is_file() else place.rglob("*"))):
        if file.is_file() and not file.is_symlink():
            content = file.read_bytes()
            looked += 1
            assert not [secret for secret in secrets if secret.encode() in content], file
    assert looked > 50
    stored = swept.postgres.dump()
    assert "trial_config" in stored and not [secret for secret in secrets if secret in stored]
    arguments = swept.head.run("ps", "-eo", "args").stdout + swept.workers[1].run("ps", "-eo", "args").stdout
    assert "uvicorn" in arguments and "raylet" in arguments
    assert not [secret for secret in secrets if secret in arguments]


def test_ray_down_leaves_the_results_and_no_process(swept):
    swept.ray("down", "cluster.yaml", "--yes")
    deadline = time.monotonic() + PATIENCE
    while left := [pid for machine in (swept.head, *swept.workers) for pid in ray_processes(machine)]:
        assert time.monotonic() < deadline, [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in left]
        time.sleep(0.5)
    assert swept.on_head("hificl", "tracking-server", "--detach", "--database",
                         "postgresql+psycopg://mlflow@127.0.0.1/mlflow").stderr.endswith("already\n")  # fmt: skip
    refused = swept.on_head("hificl", "sweep", "--attach", check=False)
    assert refused.returncode == 2 and "no Ray cluster answers" in refused.stderr
