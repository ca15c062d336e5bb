"""A slot of the resident pool: `world_size` workers in one placement group that outlive trials; a worker is a rank."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import tempfile
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from pipeline.config.load import Sweep, TrialRequest
from pipeline.config.trial import EvaluationConfig
from pipeline.pool.cluster import Version, code_version, draining, require, work_in
from pipeline.pool.processes import BUILD_SECONDS, STEP_SECONDS, worker_environment
from pipeline.pool.queue import SlotLeft, SlotLost
from pipeline.records.evaluation import Evaluation
from pipeline.records.trial import TrialReport

if TYPE_CHECKING:  # the dispatcher has no torch
    from pipeline.evaluate.generate import SplitPart
    from pipeline.evaluate.score import Answers

ROOM = 0.98  # of the processors asked for: the rest is for Tune's waiting actors, which must fit beside the last slot


class Slot:
    """`world_size` workers, connected, in the project's folder `home`, that answer `batch_size` prompts at once."""

    def __init__(self, sweep: Sweep, world_size: int, home: str, batch_size: int = 64) -> None:
        self.sweep, self.world_size, self.home, self.batch_size = sweep, world_size, home, batch_size
        self.workers: list[Any] = []
        self.group: Any = None
        self.pids: list[int] = []
        self.near: list[int] = []  # those of this machine
        self.nodes: set[str] = set()  # that the workers are on
        self.keys: set[str] = set()  # of the trials that its workers hold
        self.why_room = ""  # why its workers have room for no more, as they said last
        self.work: asyncio.Future[list[Any]] | None = None  # what they do

    async def build(self) -> None:
        """Start the workers, connect them, load what every trial needs; an earlier work may have left them."""
        if self.workers:
            return
        cpus = self.sweep.cpus_per_worker * ROOM
        bundle = {"CPU": cpus}
        if self.sweep.gpus_per_worker:
            bundle["GPU"] = self.sweep.gpus_per_worker
        self.group = placement_group([bundle] * self.world_size, strategy="PACK")
        await asyncio.wait_for(self.group.ready(), BUILD_SECONDS)
        make: Any = Worker  # ray.remote makes it an actor class, which type checkers do not see
        self.workers = [
            make.options(
                num_cpus=cpus,
                num_gpus=self.sweep.gpus_per_worker,
                runtime_env={"env_vars": worker_environment(self.sweep)},
                scheduling_strategy=PlacementGroupSchedulingStrategy(self.group, placement_group_bundle_index=i),
            ).remote(i, self.world_size, self.sweep.gpus_per_worker)
            for i in range(self.world_size)
        ]
        addresses = await self._all("address", limit=BUILD_SECONDS)
        self.pids = [pid for _, _, pid in addresses]
        self.near = [pid for host, _, pid in addresses if host == ray.util.get_node_ip_address()]
        self.nodes = {node for _, node, _ in addresses}
        together = len({host for host, _, _ in addresses}) == 1
        meeting = (await self._all("meeting", together, limit=BUILD_SECONDS))[0]
        await self._all("connect", meeting, code_version(), self.home, self.batch_size, limit=BUILD_SECONDS)

    async def room(self) -> int:
        """Return how many more trials may join those that are admitted."""
        if self.sweep.pack != "auto":
            return self.sweep.pack - len(self.keys)
        rooms = await self._all("room", limit=self.sweep.retry.hang_seconds)
        self.why_room = rooms[0][1]
        return min(room for room, _ in rooms)

    def drop(self) -> None:
        """End the workers."""
        self.keys.clear()
        for worker in self.workers:
            ray.kill(worker)
        for pid in self.near:  # a stopped process hears nothing of what Ray asks of it
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.workers, self.near = [], []
        if self.group is not None:
            remove_placement_group(self.group)
            self.group = None

    @property
    def idle(self) -> bool:
        """Whether there are workers, and they hold no trial."""
        return bool(self.workers) and not self.keys and (self.work is None or self.work.done())

    async def admit(self, request: TrialRequest) -> int:
        """Take a trial up, beside those that are there; return the epochs that it has behind it."""
        self.keys.add(request.key)
        return (await self._all("admit", request, limit=self.sweep.retry.hang_seconds))[0]

    async def evict(self, key: str) -> None:
        """Drop a trial."""
        self.keys.discard(key)
        await self._all("evict", key, limit=self.sweep.retry.hang_seconds)

    async def advance(self) -> list[TrialReport]:
        """Run one round; give up when the step counter stands still for `hang_seconds`.

        Raises:
            SlotLeft: a node of the slot is to be taken away; the last step was kept before.
            SlotLost: a worker died or hangs.
        """
        if await self._leaving():
            raise SlotLeft("its node is to be taken away")
        hang = self.sweep.retry.hang_seconds
        work = self.work = asyncio.ensure_future(self._all("advance"))
        last, since, left = -1, time.monotonic(), False
        while True:
            finished, _ = await asyncio.wait({work}, timeout=min(STEP_SECONDS, hang))
            if finished:
                return work.result()[0]
            if not left and await self._leaving():
                left = True
                await self._all("stop", limit=hang)
            try:
                steps = (await self._all("steps", limit=hang))[0]  # a process that is stopped never answers
            except SlotLost:
                work.cancel()
                raise
            if steps != last:
                last, since = steps, time.monotonic()
            elif time.monotonic() - since > hang:
                work.cancel()
                raise SlotLost(f"no step for {hang:.0f} s")

    async def keep(self, seconds: float) -> None:
        """Let what trains end behind its next step, which is kept, where that takes no longer than `seconds`."""
        if self.work is None or self.work.done():
            return
        with suppress(Exception):  # `SlotLeft` where it went well; the sweep ends in any case
            async with asyncio.timeout(seconds):
                await self._all("stop")
                await self.work

    def call_off(self, lending: int) -> None:
        """End a lending: its worker answers no further batch."""
        for worker in self.workers:
            worker.call_off.remote(lending)

    async def _leaving(self) -> bool:
        return not self.nodes.isdisjoint(await draining())

    async def _all(self, method: str, *args: Any, limit: float | None = None) -> list[Any]:
        calls = asyncio.gather(*(getattr(w, method).remote(*args) for w in self.workers))
        try:
            return await asyncio.wait_for(calls, limit)
        except ray.exceptions.RayTaskError as error:
            raise error.cause if isinstance(error.cause, Exception) else SlotLost(str(error.cause)) from None
        except ray.exceptions.RayActorError as error:
            raise SlotLost(f"a worker died: {str(error).splitlines()[0]}") from None
        except TimeoutError:
            raise SlotLost(f"'{method}' did not answer within {limit:.0f} s") from None


class KeptSlots:
    """Slots that a work leaves with their workers, who hold the backbone, for the next work of the same driver."""

    def __init__(self) -> None:
        self._slots: list[Slot] = []
        self._dispatchers: list[Any] = []  # a worker lives as long as the actor that started it

    def put(self, slots: Iterable[Slot], dispatcher: Any = None) -> None:
        """Keep slots, and the dispatcher that started their workers."""
        self._slots += slots
        if dispatcher is not None:
            self._dispatchers.append(dispatcher)

    def take(self, world_size: int, number: int) -> list[Slot]:
        """Give so many slots at most; those of another size end, for they have the room of the others."""
        fitting = [slot for slot in self._slots if slot.world_size == world_size]
        for slot in self._slots:
            if slot.world_size != world_size:
                slot.drop()
        self._slots = fitting[number:]
        if not fitting:  # nothing is left of what they started
            for dispatcher in self._dispatchers:
                ray.kill(dispatcher)
            self._dispatchers.clear()
        return fitting[:number]

    def drop(self) -> None:
        """End all of them, and who started them."""
        self.take(0, 0)


@dataclass(frozen=True)
class Lent:
    """A slot of one rank that has nothing to train, for calls of an evaluation.

    Attributes:
        worker: its worker.
        number: of the lending, with which it is called off and given back.
        ended: how many trials had ended by then.
    """

    worker: Any
    number: int
    ended: int


class CalledOff(Exception):
    """A slot that is lent is to train again; nothing came of the call."""


class Scorer:
    """What a process with a workbench does for an evaluation."""

    bench: Any
    called_off = 0  # the newest lending that is over

    def answer(
        self, requests: list[TrialRequest], evaluation: EvaluationConfig, part: SplitPart, lending: int = 0
    ) -> list[Answers]:
        """Return trials' answers to one part of their split.

        Raises:
            CalledOff: the `lending` is over, which a process that is not lent (0) never hears.
        """

        def wanted() -> None:
            if 0 < lending <= self.called_off:
                raise CalledOff

        wanted()
        return self.bench.answer(requests, evaluation, part, wanted)

    def score(self, request: TrialRequest, evaluation: EvaluationConfig, parts: list[Answers]) -> Evaluation:
        """Return the evaluation of a trial that has answered."""
        return self.bench.finish(request, evaluation, parts)


@ray.remote(max_restarts=0, max_concurrency=2)
class Worker(Scorer):
    """A resident process that keeps the backbone loaded and trains one trial after another; in between it may score.

    Two calls may run at once, so that `steps` answers while `advance` works.
    """

    def __init__(self, rank: int, world_size: int, gpus: float) -> None:
        self.rank, self.world_size, self.gpus = rank, world_size, gpus
        self.bench: Any = None
        self.folder: tempfile.TemporaryDirectory[str] | None = None
        self.listener: socket.socket | None = None

    def address(self) -> tuple[str, str, int]:
        """Return this node's address, Ray's name of it and the process id."""
        return ray.util.get_node_ip_address(), ray.get_runtime_context().get_node_id(), os.getpid()

    def meeting(self, together: bool) -> str:
        """Return where the slot's ranks meet (`join_group`): `together` on one machine, or on several."""
        if self.rank > 0 or self.world_size == 1:
            return ""
        if together:
            self.folder = tempfile.TemporaryDirectory(prefix="hificl-ranks-")  # its owner's alone
            return str(Path(self.folder.name) / "meeting")
        self.listener = socket.create_server((ray.util.get_node_ip_address(), 0))
        host, port = self.listener.getsockname()[:2]
        return f"tcp://{host}:{port}"

    def connect(self, meeting: str, code: Version, home: str, batch_size: int) -> None:
        """Join the slot's process group and load what every trial needs, in the project's folder `home`.

        Raises:
            InputError: the code here is not `code`, `home` is not here, or there is no GPU where one is asked for.
        """
        require(code)
        work_in(home)
        from pipeline.train.workbench import Workbench, device_for, join_group, use_threads

        use_threads()
        device, listener = device_for(self.gpus), self.listener.detach() if self.listener else None
        join_group(device, self.rank, self.world_size, meeting, listener)
        self.bench = Workbench(device, batch_size)

    def admit(self, request: TrialRequest) -> int:
        """Take a trial up, at its last checkpoint; return the epochs that it has behind it."""
        return self.bench.admit(request)

    def advance(self) -> list[TrialReport]:
        """Train until a trial completes an epoch; return its report.

        Raises:
            SlotLeft: `stop` was called meanwhile.
        """
        from pipeline.train.workbench import Stopped

        try:
            return self.bench.advance()
        except Stopped:  # an exception of the project's that the dispatcher reads without torch
            raise SlotLeft("its node is to be taken away; its last step is kept") from None

    def stop(self) -> None:
        """End training behind the next step, which is kept; `advance` raises then."""
        self.bench.stopping = True

    def evict(self, key: str) -> None:
        """Drop a trial."""
        self.bench.evict(key)

    def call_off(self, lending: int) -> None:
        """End what is answered for a lending behind the next batch; it may be asked before the call that it ends."""
        self.called_off = lending

    def room(self) -> tuple[int, str]:
        """Return how many more trials fit and pay beside those that are admitted, and why."""
        return self.bench.room(), self.bench.why_room

    def steps(self) -> int:
        """Return how many steps and scored batches this process has behind it: the sign of life."""
        return self.bench.steps if self.bench else 0
