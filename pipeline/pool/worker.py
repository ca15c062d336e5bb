"""One rank of a slot: a Ray actor around the training workbench, which outlives trials."""

from __future__ import annotations

import os
import socket
from typing import Any

import ray

from pipeline.config.request import TrialRequest
from pipeline.pool.nodes import Version, require, work_in
from pipeline.records.epoch import TrialReport


@ray.remote(max_restarts=0, max_concurrency=2)
class Worker:
    """A resident process that keeps the backbone loaded and trains one trial after another.

    Two calls may run at once, so that `steps` answers while `advance` works.

    Args:
        rank: of this process in the slot.
        world_size: processes of the slot.
    """

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank, self.world_size = rank, world_size
        self.bench: Any = None

    def address(self) -> tuple[str, int, int]:
        """Return this node's address, a free port on it, and the process id."""
        host = ray.util.get_node_ip_address()
        with socket.socket() as free:
            free.bind((host, 0))
            return host, free.getsockname()[1], os.getpid()

    def connect(self, host: str, port: int, code: Version, home: str) -> None:
        """Join the slot's process group and load what every trial needs, in the project's folder `home`.

        Raises:
            InputError: the code here is not `code`, or `home` is not here.
        """
        require(code)
        work_in(home)
        os.environ.update(
            RANK=str(self.rank),
            LOCAL_RANK="0",
            WORLD_SIZE=str(self.world_size),
            MASTER_ADDR=host,
            MASTER_PORT=str(port),
        )
        import torch

        from pipeline.train.workbench import Workbench, use_threads

        use_threads()
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        torch.distributed.init_process_group(backend, rank=self.rank, world_size=self.world_size)
        self.bench = Workbench()

    def admit(self, request: TrialRequest) -> int:
        """Take a trial up, at its last checkpoint; return the epochs that it has behind it."""
        return self.bench.admit(request)

    def advance(self) -> list[TrialReport]:
        """Train until a trial completes an epoch; return its report."""
        return self.bench.advance()

    def evict(self, key: str) -> None:
        """Drop a trial."""
        self.bench.evict(key)

    def room(self) -> int:
        """Return how many more trials fit and pay beside those that are admitted."""
        return self.bench.room()

    def steps(self) -> int:
        """Return how many steps and scored batches this process has behind it: the sign of life."""
        return self.bench.steps if self.bench else 0
