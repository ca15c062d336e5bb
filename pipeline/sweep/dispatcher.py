"""The resident pool: slots of workers that outlive trials, and the queue in front of them.

Ray Tune decides which trials live; its actors (`sweep.proxy`) hand their trial to this actor and wait for reports. A
slot is `world_size` workers in one placement group. A worker that dies, hangs or is killed costs its slot a rebuild and
its trial the time since the last epoch's checkpoint.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from pipeline.config import Sweep
from pipeline.errors import HificlError
from pipeline.request import TrialRequest
from pipeline.sweep.store import FINAL, TrialStore
from pipeline.sweep.worker import Worker

Resolve = Callable[[dict[str, Any]], TrialRequest]
Report = dict[str, Any]  # one epoch's metrics with "epoch", "trial_key" and "done"; or {"error": ...}

LIFE_SECONDS = 5.0  # between two looks at a working slot's step counter
ROOM = 0.98  # of the processors asked for: Tune's waiting actors take a hair, and must fit beside the last slot
BUILD_SECONDS = 300.0  # a slot that takes longer to start is given up


class SlotLost(Exception):
    """A slot's worker died or hangs; the slot is rebuilt and the trial is tried again."""


@dataclass
class _Trial:
    request: TrialRequest
    reports: list[Report] = field(default_factory=list)
    news: asyncio.Event = field(default_factory=asyncio.Event)
    allowed: int = 1  # epochs the scheduler has asked for so far
    attempts: int = 0
    stopped: bool = False
    ended: bool = False

    def deliver(self, report: Report) -> None:
        self.reports.append(report)
        self.ended = self.ended or bool(report.get("done") or "error" in report)
        self.news.set()


class _Slot:
    """`world_size` workers, connected."""

    def __init__(self, sweep: Sweep, world_size: int) -> None:
        self.sweep, self.world_size = sweep, world_size
        self.workers: list[Any] = []
        self.group: Any = None
        self.pids: list[int] = []

    async def build(self) -> None:
        cpus = self.sweep.cpus_per_worker * ROOM
        bundle = {"CPU": cpus}
        if self.sweep.gpus_per_worker:
            bundle["GPU"] = self.sweep.gpus_per_worker
        self.group = placement_group([bundle] * self.world_size, strategy="PACK")
        await asyncio.wait_for(self.group.ready(), BUILD_SECONDS)
        environment = {"OMP_NUM_THREADS": str(self.sweep.threads_per_worker)}
        if not self.sweep.gpus_per_worker:
            environment["DS_ACCELERATOR"] = "cpu"
        make: Any = Worker  # ray.remote makes it an actor class, which type checkers do not see
        self.workers = [
            make.options(
                num_cpus=cpus,
                num_gpus=self.sweep.gpus_per_worker,
                runtime_env={"env_vars": environment},
                scheduling_strategy=PlacementGroupSchedulingStrategy(self.group, placement_group_bundle_index=i),
            ).remote(i, self.world_size)
            for i in range(self.world_size)
        ]
        addresses = await self._all("address", limit=BUILD_SECONDS)
        self.pids = [pid for *_, pid in addresses]
        host, port, _ = addresses[0]
        await self._all("connect", host, port, limit=BUILD_SECONDS)

    def drop(self) -> None:
        for worker in self.workers:
            ray.kill(worker)
        self.workers = []
        if self.group is not None:
            remove_placement_group(self.group)
            self.group = None

    async def admit(self, request: TrialRequest) -> int:
        return (await self._all("admit", request, limit=self.sweep.retry.hang_seconds))[0]

    async def evict(self, key: str) -> None:
        await self._all("evict", key, limit=self.sweep.retry.hang_seconds)

    async def advance(self) -> list[Report]:
        """Run one round; give up when the step counter stands still for `hang_seconds`."""
        work = asyncio.ensure_future(self._all("advance"))
        last, since = -1, time.monotonic()
        while True:
            finished, _ = await asyncio.wait({work}, timeout=LIFE_SECONDS)
            if finished:
                return work.result()[0]
            steps = (await self._all("steps"))[0]
            if steps != last:
                last, since = steps, time.monotonic()
            elif time.monotonic() - since > self.sweep.retry.hang_seconds:
                work.cancel()
                raise SlotLost(f"no step for {self.sweep.retry.hang_seconds:.0f} s")

    async def _all(self, method: str, *args: Any, limit: float | None = None) -> list[Any]:
        calls = asyncio.gather(*(getattr(w, method).remote(*args) for w in self.workers))
        try:
            return await asyncio.wait_for(calls, limit)
        except ray.exceptions.RayActorError as error:
            raise SlotLost(f"a worker died: {str(error).splitlines()[0]}") from None
        except TimeoutError:
            raise SlotLost(f"'{method}' did not answer within {limit:.0f} s") from None


@ray.remote(num_cpus=0, max_concurrency=10000)
class Dispatcher:
    """Hands trials to slots and their reports back.

    Args:
        resolve: gives the request of a trial from Tune's configuration of it. It is pickled to this actor: a plain
            table of requests for grid and random search, so that neither torch nor transformers is imported here.
        sweep: resources and retry policy.
        store_root: the trial store, absolute.
        slots: how many slots.
        world_size: ranks of a slot.
        run_ahead: whether a trial goes on before the scheduler has seen its last epoch (right for FIFO alone).
    """

    def __init__(
        self, resolve: Resolve, sweep: Sweep, store_root: str, slots: int, world_size: int, run_ahead: bool
    ) -> None:
        self.resolve, self.sweep, self.run_ahead = resolve, sweep, run_ahead
        self.store = TrialStore(store_root)
        self.trials: dict[str, _Trial] = {}
        self.queue: asyncio.Queue[str] = asyncio.Queue()
        self.slots = [_Slot(sweep, world_size) for _ in range(slots)]
        self.loops: list[asyncio.Task] = []
        self.failure: str | None = None

    async def start(self) -> None:
        """Build the slots; returns at once, the queue is served as slots come up."""
        self.loops = [asyncio.ensure_future(self._serve(slot)) for slot in self.slots]

    async def submit(self, tune_config: dict[str, Any]) -> str:
        """Queue a trial and return its key; one that the ledger knows as done is replayed from it."""
        request = self.resolve(tune_config)
        trial = self.trials.get(request.key)
        if trial is not None and not trial.ended:
            return request.key
        self.store.open(request.config, {})
        trial = self.trials[request.key] = _Trial(request)
        done = self.store.done(request.key)
        if done is not None and done["status"] in FINAL:
            rows = self.store.epochs(request.key)
            for row in rows:
                trial.deliver({**row, "trial_key": request.key, "done": row is rows[-1]})
            if not rows:
                trial.deliver({"epoch": 0, "trial_key": request.key, "done": True})
            return request.key
        self.store.reopen(request.key)
        self.queue.put_nowait(request.key)
        return request.key

    async def next(self, key: str, seen: int) -> Report:
        """Wait for report number `seen` (0-based) of a trial; asking for it allows that epoch to be trained."""
        trial = self.trials[key]
        trial.allowed = max(trial.allowed, seen + 1)
        while len(trial.reports) <= seen:
            trial.news.clear()
            await trial.news.wait()
        return trial.reports[seen]

    async def stop(self, key: str) -> None:
        """Stop a trial; what it has learned stays in its checkpoint."""
        trial = self.trials.get(key)
        if trial is None or trial.ended:
            return
        trial.stopped = True
        trial.news.set()

    async def pids(self) -> list[list[int]]:
        """Return the process ids of every slot's workers."""
        return [slot.pids for slot in self.slots]

    async def close(self) -> None:
        """End all workers."""
        for loop in self.loops:
            loop.cancel()
        for slot in self.slots:
            slot.drop()

    async def _serve(self, slot: _Slot) -> None:
        while True:
            key = await self.queue.get()
            trial = self.trials[key]
            if trial.stopped:
                continue
            try:
                if not slot.workers:
                    await slot.build()
                await self._train(slot, trial)
            except SlotLost as lost:
                slot.drop()
                self._again(trial, f"{lost}", retry=True)
            except HificlError as error:
                self._again(trial, str(error), retry=False)
            except ray.exceptions.RayTaskError as error:
                slot.drop()  # an exception may have left ranks at different collectives
                cause = error.cause
                self._again(trial, str(cause), retry=not isinstance(cause, HificlError))
            except Exception as error:
                slot.drop()
                self._again(trial, f"{type(error).__name__}: {error}", retry=True)

    async def _train(self, slot: _Slot, trial: _Trial) -> None:
        start = await slot.admit(trial.request)
        if len(trial.reports) < start:  # a trial resumed from its checkpoint reports the epochs behind it
            for row in self.store.epochs(trial.request.key)[len(trial.reports) : start]:
                trial.deliver({**row, "trial_key": trial.request.key, "done": False})
        while not trial.ended:
            while not self.run_ahead and not trial.stopped and len(trial.reports) >= trial.allowed:
                await asyncio.sleep(0.01)
            if trial.stopped:
                await slot.evict(trial.request.key)
                self.store.finish(trial.request.key, {"status": "stopped", "epochs": len(trial.reports)})
                trial.ended = True
                return
            for report in await slot.advance():
                # a trial whose last epoch was checkpointed but not closed repeats that epoch's report to say it is done
                if report["epoch"] > len(trial.reports) or report["done"]:
                    trial.deliver(report)

    def _again(self, trial: _Trial, why: str, *, retry: bool) -> None:
        trial.attempts += 1
        if retry and trial.attempts < self.sweep.retry.max_attempts:
            self.queue.put_nowait(trial.request.key)
            return
        self.store.finish(trial.request.key, {"status": "failed", "error": why, "attempts": trial.attempts})
        trial.deliver({"error": why, "trial_key": trial.request.key, "epoch": len(trial.reports)})
