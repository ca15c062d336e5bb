"""A node of a cluster leaves during the sweep and comes back: a second raylet on loopback."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

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

    def leave(self) -> None:
        """SIGKILL of everything that runs on the node."""
        import psutil

        for one in [*psutil.Process(self.process.pid).children(recursive=True), psutil.Process(self.process.pid)]:
            one.kill()
        self.process.wait()


def test_a_node_leaves_and_comes_back(sweep, reference, fault, tmp_path_factory):
    folder = tmp_path_factory.mktemp("n")
    ensure_token()
    port = free_port()
    address = f"127.0.0.1:{port}"
    head = Node(
        sweep, folder, "--head", f"--port={port}", "--node-ip-address=127.0.0.1", "--num-cpus=0",
        "--include-dashboard=false", f"--temp-dir={folder}", "--num-gpus=0",
    )  # fmt: skip
    second = [f"--address={address}", "--node-ip-address=127.0.0.1", "--num-cpus=1", "--num-gpus=0"]
    other = None
    try:
        sweep.until(head.started, "the head")
        other = Node(sweep, folder, *second)
        sweep.until(other.started, "the node")
        set_sweep(sweep, address=address)
        sweep.begin()
        sweep.midway()
        other.leave()
        left = time.time()
        time.sleep(2)
        other = Node(sweep, folder, *second)
        events = sweep.until(lambda: [e for e in sweep.events("trial trains again") if e["time"] > left], "a new start")
        assert sweep.ended() == 0, sweep.log
    finally:
        for node in (other, head):
            if node is not None and node.process.poll() is None:
                node.leave()
    set_sweep(sweep, address=None)
    survived(sweep, reference)
    fault("node", again=events[0]["time"] - left)
