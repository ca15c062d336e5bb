"""Actors that are told what to do, in a module that imports little: each process of one begins with its imports."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import ray


class Placed:
    """What is asked of a slot's worker while it is built, and of an evaluator as it starts."""

    def __init__(self, *_) -> None:
        pass

    def address(self):
        return ray.util.get_node_ip_address(), "node", os.getpid()

    def meeting(self, _) -> str:
        return ""

    def connect(self, *_) -> None:
        pass

    def ready(self) -> None:
        pass


@ray.remote(max_restarts=0)
class Told(Placed):
    """An evaluator, or a slot's worker, without a backbone: a file `die-CALL` ends its process, `fail-NAME` raises."""

    def answer(self, requests, evaluation, part, lending):
        self._called("answer", requests)
        return [() for _ in requests]

    def score(self, request, evaluation, parts):
        self._called("score", [request])
        return f"record of {request.folder}"

    def _called(self, what, requests) -> None:
        here = Path(requests[0].manifest)
        names = "".join(request.folder for request in requests)
        with (here / "calls").open("a") as file:
            file.write(f"{what} {names}\n")
        orders = sorted(here.glob(f"die-{what}-*"))
        if orders:
            orders[0].unlink()
            os._exit(1)
        if what == "answer" and any((here / f"fail-{name}").exists() for name in names):
            raise ValueError(names)


@ray.remote(max_restarts=0)
class Looking(Placed):
    """A slot's worker, or an evaluator, that says which GPUs it is shown."""

    def sees(self) -> str | None:
        return os.environ.get("CUDA_VISIBLE_DEVICES")


@ray.remote(num_cpus=0)
class Lender:
    """A dispatcher that lends each of some workers once, the next one when the one before is back, and has no other."""

    def __init__(self, workers) -> None:
        self.workers, self.number, self.back = list(workers), 0, {}

    async def lend(self, after: int):
        from pipeline.pool.slot import Lent

        while self.number > len(self.back):
            await asyncio.sleep(0.01)
        self.number += bool(self.workers)
        return Lent(self.workers.pop(0), self.number, after + 1) if self.workers else None

    async def take_back(self, lending: int, why_lost: str) -> None:
        self.back[lending] = why_lost

    async def taken_back(self) -> dict[int, str]:
        return self.back


@ray.remote(num_cpus=0)
def worked_in(home: str) -> str:
    """Where a worker is after it went to a project's folder."""
    from pipeline.pool.cluster import work_in

    work_in(home)
    return str(Path.cwd())
