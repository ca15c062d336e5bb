"""A node of a cluster leaves during the sweep, with notice or without, and one comes: a second raylet on loopback."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from pipeline.pool import ensure_token
from tests.faults.checks import survived
from tests.faults.sweeps import Sweep, set_sweep
from tests.support.free_port import free_port

pytestmark = [pytest.mark.faults, pytest.mark.timeout(900)]


class Node:
    """One `ray start --block`."""

    def __init__(self, sweep: Sweep, folder: Path, *words: str) -> None:
        ray = Path(sys.executable).with_name("ray")
        self.log = folder / f"{len(list(folder.glob('*.log')))}.log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [str(ray), "start", "--block", "--disable-usage-stats", *words], stdout=log, stderr=log,
                start_new_session=True, cwd=sweep.folder,  # as cluster.yaml does, also with the token
                env={**sweep.environment, "RAY_AUTH_MODE": "token", "RAY_raylet_start_wait_time_s": "120"},
            )  # fmt: skip

    def started(self) -> bool:
        """Whether the cluster has it."""
        assert self.process.poll() is None, self.log.read_text()
        return "Ray runtime started" in self.log.read_text()

    @property
    def name(self) -> str:
        """Ray's name of it."""
        raylet = next(p for p in psutil.Process(self.process.pid).children(recursive=True) if p.name() == "raylet")
        return next(word.partition("=")[2] for word in raylet.cmdline() if word.startswith("--node_id="))

    def leave(self) -> None:
        """SIGKILL of everything that runs on the node."""
        for one in [*psutil.Process(self.process.pid).children(recursive=True), psutil.Process(self.process.pid)]:
            one.kill()
        self.process.wait()


class Cluster:
    """A head that trains nothing, and nodes of one processor."""

    def __init__(self, sweep: Sweep, folder: Path) -> None:
        ensure_token()
        self.sweep, self.folder, port = sweep, folder, free_port()
        self.address = f"127.0.0.1:{port}"
        head = Node(
            sweep, folder, "--head", f"--port={port}", "--node-ip-address=127.0.0.1", "--num-cpus=0",
            "--include-dashboard=false", f"--temp-dir={folder}", "--num-gpus=0",
        )  # fmt: skip
        self.nodes = [head]
        sweep.until(head.started, "the head")

    def join(self) -> Node:
        words = [f"--address={self.address}", "--node-ip-address=127.0.0.1", "--num-cpus=1", "--num-gpus=0"]
        self.nodes.append(Node(self.sweep, self.folder, *words))
        return self.nodes[-1]

    def end(self) -> None:
        for node in reversed(self.nodes):
            if node.process.poll() is None:
                node.leave()


@pytest.fixture
def cluster(sweep, tmp_path_factory):
    """A cluster of a head and a node, on which the sweep will run."""
    made = Cluster(sweep, tmp_path_factory.mktemp("n"))
    try:
        sweep.until(made.join().started, "the node")
        set_sweep(sweep, address=made.address)
        yield made
    finally:
        made.end()


def trains_again(sweep: Sweep, since: float) -> float:
    """Wait until a trial is taken up again, and for the sweep's good end; return the seconds to the first."""
    events = sweep.until(lambda: [e for e in sweep.events("trial trains again") if e["time"] > since], "a new start")
    assert sweep.ended() == 0, sweep.log
    return events[0]["time"] - since


def test_a_node_leaves_and_comes_back(cluster, sweep, reference, fault):
    sweep.begin()
    sweep.midway()
    cluster.nodes[1].leave()
    left = time.time()
    time.sleep(2)
    cluster.join()
    again = trains_again(sweep, left)
    cluster.end()
    set_sweep(sweep, address=None)
    survived(sweep, reference)
    fault("node", again=again)


def test_a_spot_instance_is_taken_away_with_notice(cluster, sweep, reference, fault, metadata):
    """The notice's words are EC2's, its service is a stand-in on loopback; Ray and the drained node are real."""
    words = [sys.executable, "-m", "pipeline", "notice", "--node", cluster.nodes[1].name]
    service = {"AWS_EC2_METADATA_SERVICE_ENDPOINT": metadata.address, "RAY_ADDRESS": cluster.address}
    environment = {**sweep.environment, **service, "RAY_AUTH_MODE": "token"}
    watch = subprocess.Popen(words, cwd=sweep.folder, env=environment, stderr=subprocess.PIPE, text=True)
    sweep.begin()
    assert sweep.held_at(1), sweep.log
    sweep.until(lambda: metadata.looks > 0, "a look")
    given = time.time()
    metadata.ends_in = 120.0
    said = watch.communicate(timeout=120)[1]
    assert watch.returncode == 0 and "what trains keeps its last step" in said, said
    for worker in sweep.workers():
        os.kill(worker, signal.SIGCONT)
    left = sweep.until(lambda: sweep.events("slot left"), "the node to be left")
    cluster.join()
    again = trains_again(sweep, given)
    assert left[0]["trials"] and not sweep.events("slot lost")
    cluster.end()
    set_sweep(sweep, address=None)
    survived(sweep, reference)
    fault("notice", again=again)
