"""What Ray is here: hosts with room for slots, actors that answer, die, hang or are cut off, a driver over a pipe.

Real are `pool.queue`, `pool.dispatcher`, `pool.slot`, `pool.supervisor` and all that a worker keeps
(`train.trial_run`, `train.checkpoint`, `records`). Played are training itself (a hash of the state and the step in the
place of a gradient), Ray's actors, and Tune.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import json
import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from pipeline import backbones
from pipeline.config.load import Requests, Sweep
from pipeline.core.errors import HificlError, WorkError
from pipeline.pool import dispatcher as dispatching
from pipeline.pool import processes, slot, supervisor
from pipeline.pool.messages import (
    NO_MORE,
    PROXY_DIED,
    Alive,
    EpochEnded,
    Outcome,
    TrialEnded,
    TrialStarted,
    WorkEnded,
    WorkLost,
    WorkRefused,
)
from pipeline.pool.queue import Queue, SlotLeft
from pipeline.pool.tuner import halving_of
from pipeline.records.evaluation import Evaluation
from pipeline.records.store import TrialFolder, check_adapter
from pipeline.tasks import tasks
from pipeline.train.trial_run import TrialRun
from tests.simulation.world import Host, Killed, Loop, Pipe, Process, Signal, World

STEP_SECONDS = 0.3
COMPARED_AFTER = (0.5, 1.5)  # of two steps an epoch the first
WEIGHTS = "weights.bin"


PASSING = (errno.EIO, errno.EMFILE, errno.ENOSPC, errno.ESTALE)  # what a schedule itself lets fail


def passing(error: BaseException) -> bool:
    """Whether an error is no wonder in a schedule: a line for the user, or what the disk was told to say."""
    return isinstance(error, HificlError) or (isinstance(error, OSError) and error.errno in PASSING)


class ActorDied(Exception):
    """Ray's RayActorError."""


class TaskFailed(Exception):
    """Ray's RayTaskError: what a call raised."""

    def __init__(self, cause: BaseException) -> None:
        super().__init__(str(cause))
        self.cause = cause


# -- a worker ----------------------------------------------------------------------------------------------------------


class Engine:
    """Its parameters are a digest; a step hashes it on, so that one step more, less or twice shows at once."""

    def __init__(self, seed: int) -> None:
        self.state = hashlib.sha256(str(seed).encode()).hexdigest()

    def step(self, ids: list[int]) -> float:
        self.state = hashlib.sha256(f"{self.state}{ids}".encode()).hexdigest()
        return self.number

    @property
    def number(self) -> float:
        return int(self.state[:8], 16) / 2**32

    def save(self, folder: Path) -> None:
        (folder / "engine.bin").write_text(self.state * 8)

    def load(self, folder: Path) -> None:
        self.state = (folder / "engine.bin").read_text()[:64]

    @contextmanager
    def whole(self) -> Iterator[None]:
        yield

    def close(self) -> None: ...


class Adapter:
    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def save_pretrained(self, folder: Path, *, extra: Any) -> None:
        folder.mkdir()
        (folder / "adapter_config.json").write_text(json.dumps(extra))
        (folder / WEIGHTS).write_text(self.engine.state * 8)


class PlayedRun(TrialRun):
    """A trial whose steps are hashes; what is kept of it, and how, is the real class's."""

    def __init__(self, config: Any, folder: Path, keep_seconds: float, compared_after: Any) -> None:
        self.config, self.rank, self.world = config, 0, 1
        self.resident = SimpleNamespace(device="cpu", loaded=SimpleNamespace(backbone=backbones.get("mini-idefics2")))
        self.manifest, self.task = SimpleNamespace(prompt="papers", definition=None), tasks.get("mini-vqa")
        self.folder = self._taken(TrialFolder(folder))
        self.samples = range(config.num_train_samples)
        self.engine = Engine(config.seed)
        self.adapter = Adapter(self.engine)
        self.memory, self.trainable, self.flops = SimpleNamespace(peak=None), 7, None
        self.global_batch = config.micro_batch_size * config.accumulation
        self.per_epoch = -(-len(self.samples) // self.global_batch)
        self.reports, self.best, self.error = [], None, None
        self.keeping, self.peak, self.packed, self.exact = 0.0, 0, 1, True
        self._kept = self.folder.adapter
        self.due = self.asked = self.leaving = False
        self._keep_seconds, self._kept_at = keep_seconds, time.monotonic()
        self._epoch = self._resume()
        self._kept_step = self.step
        self._set_points(compared_after)


class Worker:
    """What a slot's actor does; `train.workbench` and `train.loop` without a model."""

    def __init__(self, process: Process) -> None:
        self.process, self.world = process, process.world
        self.runs: list[PlayedRun] = []
        self.done, self.stopping = 0, False
        self.called_off, self.answers = 0, False

    def address(self) -> tuple[str, str, int]:
        return self.process.host.name, self.process.host.name, self.process.pid

    def meeting(self, together: bool) -> str:
        return ""

    def connect(self, meeting: str, code: Any, home: str, batch_size: int) -> None:
        self.world.sleep(self.world.rng.uniform(0.5, 3))

    def room(self) -> int:
        return 2 - len(self.runs)

    def steps(self) -> int:
        return self.done

    def call_off(self, lending: int) -> None:
        self.called_off = lending

    def answer(self, lending: int) -> None:
        self.answers = True
        for _ in range(self.world.rng.randint(1, 20)):
            if lending <= self.called_off:
                break
            self.world.sleep(self.world.rng.uniform(0.5, 1.5) * STEP_SECONDS)
        self.answers = False

    def admit(self, request: Any) -> int:
        if self.answers:
            self.world.unforeseen.append(AssertionError("a slot that is lent was given a trial"))
        self.evict(request.key)
        self.world.sleep(self.world.rng.uniform(0, 0.5))
        if request.config.seed == self.world.poison:
            self.process.end(-9)
            raise Killed
        run = PlayedRun(request.config, Path(request.folder), self.world.keep, request.compared_after)
        self.world.trains.append((request.key, run.epochs_done, self.process))
        self.runs.append(run)
        return run.epochs_done

    def evict(self, key: str) -> None:
        for run in [run for run in self.runs if run.config.key == key]:
            self.runs.remove(run)
            run.close()

    def stop(self) -> None:
        self.stopping = True

    def advance(self) -> list[Any]:
        if untold := [run for run in self.runs if run.is_untold]:
            return [run.compared_report() for run in untold]
        complete = [run for run in self.runs if run.finished]
        if complete:
            return [self._let_go(run, run.closed_report()) for run in complete]
        while self.runs and not any(run.steps_left == 0 or run.at_a_point for run in self.runs):
            self.world.sleep(self.world.rng.uniform(0.5, 1.5) * STEP_SECONDS)
            for run in self.runs:
                ids = [number for part in run.micro_batches(0, ahead=0) for number in part.ids]
                loss = run.engine.step(ids)
                if run.config.seed == self.world.diverges and run.step == run.per_epoch + 1:
                    loss = math.nan
                both = {"train_loss": loss, "ground_truth_loss": loss}
                run.finish_step(both, loss, 0.25, pack_size=1, exact=True)
                if run.due:
                    run.keep_step()
            self.done += 1
            if any(run.error for run in self.runs):
                break
            if self.stopping:
                for run in self.runs:
                    if run.steps_left:
                        run.keep_step()
                raise SlotLeft("its last step is kept")
        reports = [self._let_go(run, run.diverged_report()) for run in self.runs if run.error]
        reports += [run.compared_report() for run in self.runs if not run.error and run.steps_left and run.at_a_point]
        for run in [run for run in self.runs if not run.error and run.steps_left == 0]:
            score = run.engine.number
            reports.append(self._let_go(run, run.finish_epoch({"selection_score": score, "objective": score}, 0.25)))
        return reports

    def _let_go(self, run: PlayedRun, report: Any) -> Any:
        if report.end is not None:
            self.evict(run.config.key)
        return report

    def score(self, job: Any) -> Evaluation:
        request, evaluation = job
        folder = Path(request.folder) / "adapter"
        check_adapter(folder)
        weights = (folder / WEIGHTS).read_text()
        self.world.sleep(self.world.rng.uniform(0.1, 2))
        value = int(weights[:8], 16) / 2**32
        return Evaluation(
            trial=request.key, config=request.config.model_dump(mode="json"),
            evaluation=evaluation.model_dump(mode="json"), metric="vqa_accuracy", unit="%", value=value,
            metrics={"vqa_accuracy": value}, num_samples=1, predictions=(),
        )  # fmt: skip


class Handle:
    """A handle on an actor: `handle.method.remote(...)` gives what can be awaited."""

    def __init__(self, cluster: Cluster, host: Host, mark: str) -> None:
        self.cluster = cluster
        self.process = Process(cluster.world, host, "worker", mark)
        self.worker = Worker(self.process)
        self.lost = not host.up
        self.waiting: list[Callable[[], None]] = []
        if not host.up:
            self.process.end()
        self.process.ended.append(self._died)
        cluster.actors.append(self)

    def _died(self) -> None:
        self.cluster.world.at(self.cluster.world.rng.uniform(0.05, 2), self.declare_lost)

    def declare_lost(self) -> None:
        """Let those who wait for its answers know, and all who ask later."""
        self.lost = True
        for told in self.waiting:
            told()
        self.waiting.clear()

    def __getattr__(self, method: str) -> Any:
        return SimpleNamespace(remote=lambda *args: self._call(method, args))

    def _call(self, method: str, args: tuple[Any, ...]) -> Any:
        loop, world = asyncio.get_running_loop(), self.cluster.world
        answer = loop.create_future()

        def settle(result: Any, error: BaseException | None) -> None:
            def tell() -> None:
                if not answer.done():
                    answer.set_exception(error) if error is not None else answer.set_result(result)

            loop.poke(tell)

        def lose() -> None:
            settle(None, ActorDied("The actor died unexpectedly before finishing this task"))

        def send(result: Any, error: BaseException | None) -> None:
            if self.process.host.cut_off:
                world.at(1.0, lambda: send(result, error))
            elif not self.lost:
                if lose in self.waiting:
                    self.waiting.remove(lose)
                world.at(world.rng.expovariate(500), lambda: settle(result, error))

        def work() -> None:
            try:
                result = getattr(self.worker, method)(*args)
            except Killed:
                raise
            except Exception as error:
                world.say(f"{method} raises {type(error).__name__}: {error}")
                send(None, TaskFailed(error))
            else:
                send(result, None)

        def arrive() -> None:
            if self.process.host.cut_off:
                world.at(1.0, arrive)
            elif self.process.alive:
                self.process.spawn(work)

        if self.lost:
            lose()
        else:
            self.waiting.append(lose)
            world.at(world.rng.expovariate(500), arrive)
        return answer


class Cluster:
    """The hosts, the actors on them, and the drivers of one schedule."""

    def __init__(self, world: World, hosts: list[Host], room: int) -> None:
        self.world, self.hosts, self.room = world, hosts, room
        self.actors: list[Handle] = []
        self.taken: dict[Host, int] = dict.fromkeys(hosts, 0)
        self.drivers: list[Process] = []

    # -- what `pool.slot` and `pool.dispatcher` use of Ray -------------------------------------------------------------

    async def draining(self) -> set[str]:
        return {host.name for host in self.hosts if host.drained}

    def ray(self) -> Any:
        exceptions = SimpleNamespace(RayActorError=ActorDied, RayTaskError=TaskFailed)
        util = SimpleNamespace(get_node_ip_address=lambda: self.world.process.host.name)
        return SimpleNamespace(exceptions=exceptions, util=util, kill=self.kill)

    def kill(self, handle: Handle) -> None:
        """Ray's word to an actor: one that is cut off hears it later."""

        def kill() -> None:
            world, process = self.world, handle.process
            if process.host.cut_off or process.frozen_until > world.now:  # and a while after it is back
                world.at(max(process.frozen_until - world.now, 0.0) + world.rng.uniform(0.1, 10), kill)
            else:
                process.end()

        self.world.at(self.world.rng.uniform(0.01, 1), kill)

    def placement_group(self, bundles: list[Any], strategy: str) -> Any:
        group = SimpleNamespace(host=None, mark=self.world.process.mark)

        async def ready() -> None:
            while True:
                free = [
                    host
                    for host in self.hosts
                    if host.up and not host.cut_off and not host.drained and self.taken[host] < self.room
                ]
                if free:
                    group.host = min(free, key=lambda host: self.taken[host])
                    self.taken[group.host] += 1
                    return
                await asyncio.sleep(1)

        group.ready = ready
        return group

    def remove_placement_group(self, group: Any) -> None:
        if group.host is not None:
            self.taken[group.host] -= 1
            group.host = None

    def options(self, *, scheduling_strategy: Any, **_: Any) -> Any:
        group = scheduling_strategy.placement_group
        return SimpleNamespace(remote=lambda *_: Handle(self, group.host, group.mark))

    def host_lost(self, host: Host, *, after: float) -> None:
        """Let Ray give up a host's actors; those that still run there hear of it when they can."""

        def give_up() -> None:
            for handle in self.actors:
                if handle.process.host is host and not handle.lost:
                    handle.declare_lost()
                    self.kill(handle)

        self.world.at(after, give_up)

    def job_ended(self, mark: str) -> None:
        """A driver has gone: Ray ends its actors."""
        for handle in self.actors:
            if handle.process.mark == mark:
                handle.declare_lost()
                self.kill(handle)
        self.taken = {
            host: sum(h.process.host is host and h.process.alive and h.process.mark != mark for h in self.actors)
            for host in self.hosts
        }

    # -- the driver ----------------------------------------------------------------------------------------------------

    def reap(self, mark: str) -> None:
        self.world.sleep(0.1)
        for process in list(self.world.processes.values()):
            if process.mark == mark and process.host is self.world.process.host and process is not self.world.process:
                process.end()

    def start_driver(self, mark: str, pipe: Pipe) -> Process:
        process = Process(self.world, self.world.process.host, "driver", mark)
        process.ended += [pipe.close, lambda: self.world.at(1.0, lambda: self.job_ended(mark))]
        parent = self.world.process
        process.spawn(self._drive, process, pipe, main=True)
        parent.ended.append(lambda: None)
        self.drivers.append(process)
        return process

    def _drive(self, process: Process, pipe: Pipe) -> None:
        world = self.world
        try:
            work = pipe.recv()
        except EOFError:
            return
        if work == NO_MORE:
            return

        works, arrived = deque[Any](), [Signal(world)]

        def hear() -> None:
            with suppress(EOFError, OSError):
                while (word := pipe.recv()) != NO_MORE:
                    works.append(word)
                    arrived[0].set()
            world.sleep(world.rng.uniform(0.1, processes.ENDING_SECONDS))
            process.end()

        def send(message: Any) -> None:
            with suppress(OSError):
                pipe.send(message)

        def say_alive() -> None:
            while True:
                world.sleep(processes.LIFE_SECONDS / 2)
                send(Alive())

        process.spawn(hear)
        world.sleep(world.rng.uniform(1, 5))  # Ray's start
        process.spawn(say_alive)
        try:
            while True:
                if isinstance(work, supervisor.Training):
                    loop = Loop(world)
                    loop.run(self._tune(work, send))
                else:
                    for job in work.jobs:
                        send(Outcome(job[1].key, self._score(process, job)))
                send(WorkEnded())
                while not works:
                    arrived[0] = Signal(world)
                    arrived[0].wait()
                work = works.popleft()
        except HificlError as error:
            send(WorkRefused(error))
        except Killed:
            raise
        except Exception as error:
            world.say(f"driver: {type(error).__name__}: {error}")
            if not passing(error):
                world.unforeseen.append(error)
            send(WorkLost(f"{type(error).__name__}: {error}"))

    def _score(self, driver: Process, job: Any) -> object:
        """Let a process on some host score a trial, three times if need be."""
        world = self.world
        for _ in range(3):
            hosts = [host for host in self.hosts if host.up and not host.cut_off]
            if not hosts:
                world.sleep(5)
                continue
            worker = Process(world, world.rng.choice(hosts), "scorer", driver.mark)
            box, ended = [], Signal(world)
            worker.ended.append(ended.set)

            def work(worker: Process = worker, box: list[Any] = box) -> None:
                try:
                    box.append(Worker(worker).score(job))
                except Killed:
                    raise
                except Exception as error:
                    box.append(supervisor._sendable(error))

            worker.spawn(work, main=True)
            ended.wait(60)
            if box:
                return box[0]
            worker.end()
        return WorkError("no worker scored it")

    async def _tune(self, work: Any, send: Callable[[Any], None]) -> None:
        """What Ray Tune does: waits for reports, stops trials, and its actors die now and then."""
        world, plan, sweep = self.world, work.plan, work.params.sweep
        early = sweep.early_exit.model_copy(update={"after": COMPARED_AFTER if world.exits else ()})
        table = Requests(
            {key: replace(plan.request_of(plan.trials[key]), compared_after=early.after) for key in work.keys}
        )
        groups = [list(plan.trials)] if world.exits else []
        leaves = halving_of(groups, work.keys, sweep.model_copy(update={"early_exit": early}), work.store)
        run_ahead = not world.stops
        plain = dispatching.Dispatcher.__ray_metadata__.modified_class
        slots = max(1, min(len(work.keys), self.room * len(self.hosts)))
        queue = Queue(slots, sweep.retry.max_attempts, run_ahead=run_ahead, order=work.keys)
        pool = [slot.Slot(sweep, 1, "") for _ in range(slots)]
        dispatcher = plain(table, work.store, queue, pool, halving=leaves)
        note = dispatcher.journal.note

        def noted(event: str, **facts: Any) -> None:
            world.gave_up |= event == "trial failed"
            note(event, **facts)

        dispatcher.journal.note = noted
        await dispatcher.start()

        def gone(loop: Any) -> None:
            if not loop.cancelled() and loop.exception() is not None:
                world.say("a slot is served no more")
                world.unforeseen.append(loop.exception())

        for loop in dispatcher.loops:
            loop.add_done_callback(gone)
        waiting = list(reversed(work.keys))

        async def follow(key: str) -> str | None:
            seen, started = 0, False
            while True:
                await asyncio.sleep(world.rng.uniform(0, 0.3))
                if not started:
                    await dispatcher.submit({"trial": key})
                    send(TrialStarted(key))
                    started = True
                if world.rng.random() < world.proxies_die:
                    seen, started = 0, False  # another actor asks for all of it again
                    continue
                report = await dispatcher.next(key, seen)
                if report.error is None:
                    seen += 1
                if report.metrics:
                    send(EpochEnded(key, report.metrics))
                stopped = plan.trials[key].seed in world.stops and report.epoch >= 1
                if report.end is not None or stopped:
                    await dispatcher.stop(key)
                    return report.error

        async def proxy() -> None:
            while waiting:
                key = waiting.pop()
                for _ in range(1 + sweep.retry.max_attempts):
                    try:
                        error = await follow(key)
                        break
                    except Exception as raised:  # Tune starts another actor, a few times
                        world.say(f"actor of {key[:6]}: {type(raised).__name__}: {raised}")
                        if not passing(raised):
                            world.unforeseen.append(raised)
                        error = PROXY_DIED
                send(TrialEnded(key, error))

        async def borrow() -> None:
            after = -1
            while (lent := await dispatcher.lend(after)) is not None:
                why_lost = ""
                try:
                    await lent.worker.answer.remote(lent.number)
                except ActorDied as error:
                    why_lost = str(error)
                await dispatcher.take_back(lent.number, why_lost)
                after = lent.ended if world.rng.random() < 0.5 else -1

        borrower = asyncio.ensure_future(borrow())
        borrower.add_done_callback(gone)
        most = max(slots + 2, len(work.keys) if world.exits else 0)  # as `pool.tuner` has it
        await asyncio.gather(*(proxy() for _ in range(most)))
        await dispatcher.end_lending()
        with suppress(TimeoutError):
            await asyncio.wait_for(borrower, sweep.retry.hang_seconds)
        with suppress(TimeoutError):
            await asyncio.wait_for(dispatcher.close(), 30)  # as `pool.tuner` does


class Driver(supervisor.Driver):
    """The stage's end of the pipe is the real one; its start is the simulation's."""

    cluster: Cluster

    def __init__(self, sweep: Sweep) -> None:
        import uuid

        cluster = Driver.cluster
        self.mark, self.works = uuid.uuid4().hex, False
        self.written = BytesIO()  # no Ray of C++ here, which would write into it as it dies
        self.pipe, end = Pipe.pair(cluster.world)
        process = cluster.start_driver(self.mark, end)
        cluster.world.process.ended.append(self.pipe.close)
        ended = Signal(cluster.world)
        process.ended.append(ended.set)

        def wait(timeout: float | None = None) -> int:
            import subprocess

            if process.alive and not ended.wait(timeout):
                raise subprocess.TimeoutExpired("driver", timeout or 0)
            return process.status

        self.process = SimpleNamespace(wait=wait, kill=process.end, pid=process.pid)
