"""One schedule: a study's sweep and evaluation, disturbed as the seed says, and what must be true at its end.

The invariants:
    - nothing is lost: what was told as ended or trained stays so, and every trial ends as an undisturbed one does, to
      the bit;
    - nothing is done twice: no epoch is trained again whose checkpoint is whole, MLflow has each trial and step once;
    - no report without its bits: whatever names a digest names that of the file that lies there, at any moment;
    - it ends: once nothing disturbs it any more, within a bounded time and number of starts, and without a traceback.
"""

# ruff: noqa: PLW0108 - what is patched looks up the schedule that runs now

from __future__ import annotations

import errno
import functools
import io
import logging
import os
import random
import sys
import time
import traceback
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from pipeline import backbones
from pipeline.config.load import Explicit, Params, Study, StudyMethod, load
from pipeline.config.trial import EvaluationConfig, TrialConfig
from pipeline.core import locks, progress
from pipeline.core.errors import HificlError
from pipeline.plan.space import Cell, Digests, cells
from pipeline.pool import dispatcher, slot, supervisor
from pipeline.pool.messages import Watcher
from pipeline.records import store as records
from pipeline.records.evaluation import Evaluation, StudyFile
from pipeline.records.trial import Provenance, TrialEnd
from pipeline.sweep import evaluate, mlflow_sync, train
from pipeline.tasks import tasks
from pipeline.tracking import client, provenance, store
from tests.conftest import ROOT
from tests.simulation import disk as disks
from tests.simulation import known
from tests.simulation.cluster import Cluster, Driver, passing
from tests.simulation.disk import HOME, Disk, Files
from tests.simulation.tracking import ADDRESS, Client, Server
from tests.simulation.world import Host, Killed, Process, Signal, Stuck, Thread, World

EPOCHS, STUDY = (3, 2, 2), "again"  # of each trial; only a third epoch removes a checkpoint of the first
TRIALS = len(EPOCHS)
STARTS = 6  # of a stage, once nothing disturbs it
SECONDS = 3600.0  # of virtual time, likewise


class Violation(Exception):
    """An invariant does not hold."""


# -- the study ---------------------------------------------------------------------------------------------------------


@functools.cache
def study() -> tuple[Params, list[Cell]]:
    """Return parameters whose one study is a few trials, and its cells."""
    params = load(ROOT / "params.yaml")
    rows = {}
    for seed, epochs in enumerate(EPOCHS):
        config = TrialConfig(
            backbone="mini-idefics2", task="mini-vqa", method="hificl", seed=seed, epochs=epochs, num_train_samples=8,
            micro_batch_size=4, accumulation=1, backbone_digest="0" * 64, manifest_digest="1" * 64,
        )  # fmt: skip
        rows[f"row{seed}"] = StudyMethod(
            method="hificl", trial=config, evaluation=EvaluationConfig(trial=config.key, num_samples=1)
        )
    backbone, task = backbones.get("mini-idefics2").stands_for, tasks.get("mini-vqa").stands_for
    about = Study(title="Trials", methods=rows, seeds=[0], backbones=[str(backbone)], tasks=[str(task)])
    run = {"backbones": ["mini-idefics2"], "tasks": ["mini-vqa"], "studies": [STUDY], "stand_ins": {}}
    retry = params.sweep.retry.model_copy(update={"max_attempts": 3, "hang_seconds": 30.0})
    params = params.model_copy(
        update={
            "run": params.run.model_copy(update=run), "explicit": Explicit(), "studies": {STUDY: about},
            "sweep": params.sweep.model_copy(update={"retry": retry, "pack": 2, "search": "grid", "scheduler": "fifo"}),
            "tracking": params.tracking.model_copy(
                update={"uri": ADDRESS, "artifacts": None, "system_metrics": False, "patience_seconds": 60.0}
            ),
        }
    )  # fmt: skip
    sizes = {"mini-vqa": 8}
    digests = Digests(
        backbones={"mini-idefics2": "0" * 64}, manifests={"mini-vqa": "1" * 64}, train_sizes=sizes,
        selection_sizes=sizes,
    )  # fmt: skip
    return params, cells(params, STUDY, digests)


@functools.cache
def keys() -> dict[str, TrialConfig]:
    return {cell.recorded.key: cell.recorded for cell in study()[1] if cell.recorded is not None}


def key_of(seed: int | None) -> str:
    return next(key for key, config in keys().items() if config.seed == seed)


# -- Python turned to the simulation -----------------------------------------------------------------------------------


class Now:
    """What the patched functions speak to."""

    world: World
    files: Files


class Quiet(Watcher):
    """In the place of the terminal's view: hears what the sweep tells."""

    def __init__(self, *_: Any) -> None: ...

    def __enter__(self) -> Quiet:
        return self

    def __exit__(self, *_: Any) -> None: ...

    def on_report(self, key: str, report: Any) -> None:
        told = Now.world.told
        told[key] = max(told.get(key, 0), report.epoch)

    def on_end(self, key: str, error: str | None) -> None:
        if error is None:
            Now.world.ended.add(key)


@functools.cache
def _patches() -> dict[tuple[Any, str], Any]:
    own = disks.turned(lambda: Now.files)

    def inside() -> bool:
        return Now.world.current is not None

    def wall() -> float:
        world = Now.world
        return world.now + (world.process.host.clock_offset if inside() else 1.7e9)

    real_pid, real_uname, real_kill = os.getpid, os.uname, os.kill

    def kill(pid: int, number: int) -> None:
        if not inside():
            real_kill(pid, number)
        process = Now.world.processes.get(pid)
        if process is None or not process.alive:
            raise ProcessLookupError(errno.ESRCH, "No such process")
        process.end()

    def started(pid: int) -> str:
        process = Now.world.processes.get(pid)
        return process.started if process is not None and process.alive else ""

    def boot() -> str:
        return f"{Now.world.process.host}-{Now.world.process.host.boot}"

    def host() -> str:
        return Now.world.process.host.name

    own |= {
        (time, "time"): wall, (time, "time_ns"): lambda: int(wall() * 1e9),
        (time, "monotonic"): lambda: Now.world.now, (time, "perf_counter"): lambda: Now.world.now,
        (time, "sleep"): lambda seconds: Now.world.sleep(seconds),
        (time, "strftime"): lambda *_: f"{Now.world.now:.0f}",
        (uuid, "uuid4"): lambda: uuid.UUID(int=Now.world.rng.getrandbits(128), version=4),
        (os, "getpid"): lambda: Now.world.process.pid if inside() else real_pid(),
        (os, "uname"): lambda: SimpleNamespace(nodename=host()) if inside() else real_uname(),
        (os, "kill"): kill,
        (locks, "boot"): boot, (locks, "started"): started,
        (locks, "fcntl"): SimpleNamespace(
            flock=lambda *args: Now.files.flock(*args), LOCK_EX=locks.fcntl.LOCK_EX, LOCK_SH=locks.fcntl.LOCK_SH,
            LOCK_NB=locks.fcntl.LOCK_NB,
        ),
        (locks, "threading"): SimpleNamespace(
            Event=lambda: Signal(Now.world), Thread=lambda target, args, **_: Thread(Now.world, target, args)
        ),
        (provenance, "boot"): boot, (provenance, "started"): started,
        (provenance, "socket"): SimpleNamespace(gethostname=host),
        (client, "provenance"): lambda root: Provenance(commit="0" * 40, dirty=False),
        (client, "tempfile"): SimpleNamespace(TemporaryDirectory=lambda: nullcontext("/unused")),  # for no answers
        (client, "MlflowClient"): Client, (store, "_probe_server"): _probe,
        (mlflow_sync, "ModelRegistry"): lambda tracker: SimpleNamespace(register=lambda candidates: 0),
        (supervisor, "Driver"): Driver,
        (supervisor, "reap"): lambda mark: Driver.cluster.reap(mark),
        (slot, "placement_group"): lambda *args, **named: Driver.cluster.placement_group(*args, **named),
        (slot, "remove_placement_group"): lambda group: Driver.cluster.remove_placement_group(group),
        (slot, "Worker"): SimpleNamespace(options=lambda **named: Driver.cluster.options(**named)),
        (slot, "code_version"): dict,
        (slot, "draining"): lambda: Driver.cluster.draining(),
        (train, "all_cells"): lambda *_: study()[1], (evaluate, "all_cells"): lambda *_: study()[1],
        (train, "in_order"): nullcontext, (evaluate, "in_order"): nullcontext, (train, "View"): Quiet,
        (records, "held"): _held,
        (progress, "console"): SimpleNamespace(is_terminal=False, print=_said),
    }  # fmt: skip
    return own


def _said(text: str, **_: Any) -> None:
    Now.world.say(f"says: {text}")


@contextmanager
def _held(path: Path, what: str, **named: Any) -> Iterator[None]:
    """The store's lock, and that nobody else has it; who was frozen or cut off may have lost it."""
    with locks.held(path, what, **named):
        world, process = Now.world, Now.world.process
        if any(other.alive for other in world.holders) and not world.run_of.until:
            world.run_of.fail(f"{process} and {world.holders} hold the store at once")
        world.holders.append(process)
        try:
            yield
        finally:
            world.holders.remove(process)


def _probe(uri: str) -> None:
    try:
        Client.server.probe()
    except OSError as error:
        raise store._unreachable(uri, error, "") from None


@contextmanager
def turned(world: World, files: Files, cluster: Cluster, server: Server) -> Iterator[None]:
    """Turn Python's clock, files and ids, and the project's doors to Ray and MLflow, to a simulation."""
    Now.world, Now.files, Driver.cluster, Client.server = world, files, cluster, server
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # of tasks that died with their process
    ray = cluster.ray()
    patches = {**_patches(), **known.turned(), (slot, "ray"): ray, (dispatcher, "ray"): ray}
    patches[sys, "stderr"] = io.StringIO()
    before = {(owner, name): vars(owner)[name] for owner, name in patches}  # a classmethod as such
    for (owner, name), value in patches.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for (owner, name), value in before.items():
            setattr(owner, name, value)


# -- what disturbs -----------------------------------------------------------------------------------------------------


@dataclass
class Kind:
    """What a schedule is like, by its seed.

    Attributes:
        shared: whether `runs/` is on NFS, with three machines; else one machine with a disk that loses what is not
            synced.
        stops: seeds of the trials that the scheduler stops after an epoch.
        diverges: seed of the trial whose loss is not finite in its second epoch.
        poison: seed of the trial that kills its worker each time.
        two: two people run the same commands.
        keep: seconds after which a trial keeps its state within an epoch.
        exits: the trials are compared after half an epoch, and after one and a half, and the worse half leaves.
    """

    shared: bool = False
    memory: float = 0.0
    locks: str = "all"
    slow: float = 2e-4
    stops: frozenset[int] = frozenset()
    diverges: int | None = None
    poison: int | None = None
    two: bool = False
    keep: float = 0.5  # of the two steps of an epoch nearly always the first is kept then
    exits: bool = False
    faults: int = 0
    span: float = 60.0

    @classmethod
    def drawn(cls, seed: int) -> Kind:
        dice = random.Random(f"kind {seed}")
        shared = dice.random() < 0.5
        kind = cls(
            shared=shared, memory=dice.choice((0.0, 3.0, 30.0)) if shared else 0.0,
            locks=dice.choice(("all", "all", "machine", "none")) if shared else dice.choice(("all", "all", "none")),
            slow=dice.choice((2e-4, 5e-3, 2e-2)), stops=frozenset({1}) if dice.random() < 0.25 else frozenset(),
            diverges=2 if dice.random() < 0.2 else None, two=dice.random() < 0.2, faults=dice.randint(1, 6),
            span=dice.choice((15.0, 40.0, 120.0)), poison=0 if dice.random() < 0.1 else None,
            keep=dice.choice((0.5, 0.5, 1.0)),
        )  # fmt: skip
        plain = not kind.stops and kind.diverges is None and kind.poison is None
        return replace(kind, exits=plain and dice.random() < 0.4)


class Trouble:
    """The faults of a schedule, drawn from its dice."""

    def __init__(self, run: Run) -> None:
        self.run, self.world, self.dice = run, run.world, run.world.rng
        kinds = [self.kill, self.kill, self.freeze, self.power_cut, self.full, self.sick, self.starve, self.jump,
                 self.away, self.lossy, self.proxies, self.flip]  # fmt: skip
        if run.kind.shared:
            kinds += [self.partition, self.partition, self.freeze, self.notice]
        for _ in range(run.kind.faults):
            fault = self.dice.choice(kinds)
            if self.dice.random() < 0.5:  # at a moment
                self.world.at(self.dice.uniform(0, run.kind.span), functools.partial(self.strike, fault, None))
            else:  # in the middle of some operation
                number = int(10 ** self.dice.uniform(1, 3.75))  # most schedules end before the last
                self.world.strikes[number] = functools.partial(self.strike, fault)

    def strike(self, fault: Callable[[Process | None], None], process: Process | None) -> None:
        if self.run.over or (process is not None and process.name == "operator"):
            return
        current, self.world.current = self.world.current, None
        fault(process)
        self.world.current = current

    def _some(self, process: Process | None) -> Process | None:
        if process is not None:
            return process
        living = [p for p in self.world.processes.values() if p.alive and p.name != "operator"]
        return self.dice.choice(living) if living else None

    def kill(self, process: Process | None) -> None:
        if (process := self._some(process)) is not None:
            self.world.say(f"FAULT: SIGKILL of {process}")
            process.end(-9)

    def freeze(self, process: Process | None) -> None:
        if (process := self._some(process)) is None:
            return
        seconds = self.dice.choice((2, 20, 60, 200)) * self.dice.random()
        who = [process]
        if self.dice.random() < 0.4:
            who = [p for p in self.world.processes.values() if p.host is process.host and p.name != "operator"]
        self.world.say(f"FAULT: {who} are frozen for {seconds:.1f} s")
        for each in who:
            each.frozen_until = max(each.frozen_until, self.world.now + seconds)
        self.run.lasts(seconds)

    def _host(self, process: Process | None) -> Host:
        return process.host if process is not None else self.dice.choice(self.run.hosts)

    def power_cut(self, process: Process | None) -> None:
        self._goes_down(self._host(process))

    def _goes_down(self, host: Host) -> None:
        if not host.up:
            return
        self.world.say(f"FAULT: {host} loses its power")
        self.run.repeats = True
        self.run.power_cut(host)
        seconds = self.dice.uniform(5, 30)
        self.run.lasts(seconds)
        self.world.at(seconds, functools.partial(self.run.power_back, host))

    def notice(self, process: Process | None) -> None:
        """A spot instance is announced to go, and goes; another of its name comes."""
        host = self._host(process)
        if not host.up or host.drained:
            return
        seconds = self.dice.uniform(0, 120)
        self._while(f"{host} is to be taken away", host, "drained", True, False, (seconds, seconds))
        self.run.lasts(seconds)
        self.world.at(seconds, functools.partial(self._goes_down, host))

    def full(self, _: Process | None) -> None:
        self._while("the disk is full", self.run.disk, "full", True, False, (1, 40))

    def sick(self, _: Process | None) -> None:
        share, number = self.dice.choice((0.003, 0.03)), self.dice.choice((errno.EIO, errno.EMFILE))
        what = {errno.EIO: ("read", "fsync", "list"), errno.EMFILE: ("open", "list")}[number]

        def fails(process: Process, operation: str) -> int | None:
            return number if operation in what and self.dice.random() < share else None

        self._while(f"errno {number} now and then", self.run.disk, "sick", fails, None, (1, 20))

    def starve(self, process: Process | None) -> None:
        if (process := self._some(process)) is not None:
            self.world.say(f"FAULT: {process} has no file descriptors left for a while")
            process.starved_until = self.world.now + self.dice.uniform(0.1, 10)
            self.run.lasts(10)

    def jump(self, process: Process | None) -> None:
        host, days = self._host(process), self.dice.uniform(-2, 2)
        self.world.say(f"FAULT: the clock of {host} jumps by {days:.2f} days")
        host.clock_offset += days * 86400

    def away(self, _: Process | None) -> None:
        self._while("the tracking server is away", self.run.server, "away", True, False, (1, 200))

    def lossy(self, _: Process | None) -> None:
        self._while("answers are lost", self.run.server, "loses", self.dice.choice((0.05, 0.3)), 0.0, (5, 60))

    def proxies(self, _: Process | None) -> None:
        self._while("Tune's actors die", self.world, "proxies_die", 0.2, 0.0, (5, 30))

    def partition(self, process: Process | None) -> None:
        host = self._host(process)
        seconds = self.dice.choice((5, 40, 150)) * self.dice.random()
        self._while(f"{host} is cut off", host, "cut_off", True, False, (seconds, seconds))
        if self.dice.random() < 0.5:
            host.cut_from_disk = True
            self.world.at(seconds, functools.partial(setattr, host, "cut_from_disk", False))
        if seconds > 20:
            self.run.cluster.host_lost(host, after=20)

    def flip(self, _: Process | None) -> None:
        """Change a bit of a file in a checkpoint: damage that nothing announces."""
        found = self.run.files_below("/checkpoint/")
        if found:
            path, node = self.dice.choice(found)
            if node.data:
                self.world.say(f"FAULT: a bit of {path} flips")
                self.run.repeats = True
                node.data[self.dice.randrange(len(node.data))] ^= 1 << self.dice.randrange(8)

    def _while(self, says: str, owner: Any, name: str, value: Any, after: Any, between: tuple[float, float]) -> None:
        seconds = self.dice.uniform(*between)
        self.run.lasts(seconds if name == "cut_off" else 0.0)
        self.world.say(f"FAULT: {says} for {seconds:.1f} s")
        setattr(owner, name, value)
        self.world.at(seconds, lambda: setattr(owner, name, after))


# -- a run -------------------------------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """What came of a schedule."""

    seed: int
    problem: str | None
    seconds: float
    operations: int
    faults: Counter[str] = field(default_factory=Counter)
    log: list[str] = field(default_factory=list)


class Run:
    """One schedule in progress."""

    def __init__(self, seed: int, kind: Kind | None = None, *, verbose: bool = False) -> None:
        world = self.world = World(seed)
        world.verbose = verbose
        self.kind = Kind.drawn(seed) if kind is None else kind
        world.say(f"{self.kind}")
        self.seed, self.over, self.quiet, self.repeats = seed, False, False, False
        self.until = 0.0  # until when something is frozen, cut off or without power
        world.told, world.ended, world.trains, world.unforeseen, world.holders = {}, set(), [], [], []
        world.run_of = self
        world.stops, world.diverges, world.poison = self.kind.stops, self.kind.diverges, self.kind.poison
        world.exits, world.gave_up = self.kind.exits, False
        world.keep = self.kind.keep
        world.proxies_die = 0.0
        self.hosts = [Host(world, name) for name in (("a", "b", "c") if self.kind.shared else ("a",))]
        self.disk = Disk(
            world, shared=self.kind.shared, memory=self.kind.memory, locks=self.kind.locks, slow=self.kind.slow
        )
        self.files = Files(world, self.disk)
        self.server = Server(world)
        self.cluster = Cluster(world, self.hosts, room=1 if self.kind.shared else 2)
        self.home = Host(world, "desk")
        self.ready: set[str] = set()
        self.wrong: list[str] = []
        self.published: Counter[tuple[str, str]] = Counter()
        self.disk.hears.append(self.heard)

    # -- people --------------------------------------------------------------------------------------------------------

    def operate(self, who: int) -> None:
        """Run the sweep, then the evaluation, again and again until both succeed: what a person does, or a study."""
        world = self.world
        as_study = self.seed % 5 == 0 and self.kind.poison is None  # whose failed trial ends it before the evaluation
        for name in ("study",) if as_study else ("sweep", "evaluate"):
            starts, said = 0, ""
            while True:
                starts += self.quiet
                if starts > STARTS:
                    raise Violation(f"{name} fails {STARTS} times with nothing in its way: {said}")
                status, said = self.start(name, who)
                world.say(f"{name} of {who} ends with {status}: {said}")
                if self.kind.two and "held by" in said:
                    starts = 0  # by the other one
                if status == 0:
                    break
                world.sleep(world.rng.uniform(1, 15))
        self.ready.add(str(who))

    def start(self, name: str, who: int) -> tuple[int, str]:
        world = self.world
        hosts = [host for host in self.hosts if host.up]
        if not hosts:
            return -1, "no machine is up"
        stage = Process(world, hosts[who % len(hosts)], name)
        said, ended = ["killed"], Signal(world)
        stage.ended.append(ended.set)

        def work() -> None:
            params, _ = study()
            try:
                with supervisor.Drivers() as drivers:
                    if name != "evaluate":
                        train.sweep(params, [STUDY], drivers, Path(HOME))
                    if name != "sweep":
                        evaluate.evaluate(params, [STUDY], drivers, Path(HOME))
                said[0] = "well"
                stage.end(0)
            except HificlError as error:
                said[0] = str(error)
                stage.end(0 if self.as_it_must_be(name, said[0]) else error.exit_code)
            except Killed:
                raise
            except Exception as error:
                said[0] = f"{type(error).__name__}: {error}"
                if not passing(error):
                    world.unforeseen.append(error)
                stage.end(1)

        stage.spawn(work, main=True)
        while stage.alive:
            ended.wait(1000)
        return stage.status, said[0]

    def as_it_must_be(self, name: str, said: str) -> bool:
        """Whether a stage has done all and says which trials come to nothing in this schedule."""
        if "damaged" in said:
            self.fail(f"{name} meets damage: {said}")
        failed = self.kind.poison is not None
        missing = self.kind.diverges is not None or self.kind.exits  # who leaves within the first epoch has no adapter
        if name == "sweep":
            whose = key_of(self.kind.poison) if failed else ""
            told = failed and f"1 of {TRIALS} trials failed; the first, {whose}" in said
            return told and self.end_of(whose) is not None  # a disk that is full keeps none: then it is tried again
        return (failed or missing) and f"{failed + missing} of {TRIALS} cells have no number" in said

    def lasts(self, seconds: float) -> None:
        self.until = max(self.until, self.world.now + seconds)

    # -- machines ------------------------------------------------------------------------------------------------------

    def power_cut(self, host: Host) -> None:
        host.up = False
        for process in list(self.world.processes.values()):
            if process.host is host and process.alive:
                process.end(-9)
        self.disk.forget(host)
        if not self.kind.shared:
            self.disk.power_cut()
            self.check_kept("after a power cut")

    def power_back(self, host: Host) -> None:
        host.up, host.boot = True, host.boot + 1

    # -- what must be true ---------------------------------------------------------------------------------------------

    def files_below(self, part: str) -> list[tuple[str, Any]]:
        found = []

        def walk(path: str, node: Any) -> None:
            for name in sorted(node.entries):
                below = node.entries[name]
                if below.folder:
                    walk(f"{path}/{name}", below)
                elif part in f"{path}/{name}" and "/." not in path:
                    found.append((f"{path}/{name}", below))

        walk(HOME, self.disk.root)
        return found

    def text(self, path: str) -> bytes | None:
        node = self.disk.truth(path)
        return None if node is None or node.folder else bytes(node.data)

    def digest(self, path: str) -> str | None:
        import hashlib

        text = self.text(path)
        return None if text is None else hashlib.sha256(text).hexdigest()

    def folder_digest(self, path: str) -> str | None:
        import hashlib

        folder = self.disk.truth(path)
        if folder is None or not folder.entries:
            return None
        content = hashlib.sha256()
        for name in sorted(folder.entries):
            content.update(name.encode() + b"\0" + bytes(folder.entries[name].data))
        return content.hexdigest()

    def end_of(self, key: str) -> TrialEnd | None:
        text = self.text(f"{HOME}/runs/{key}/done.json")
        return None if text is None else TrialEnd.parse(text, key, "")

    def fail(self, text: str) -> None:
        self.world.say(f"VIOLATION: {text}")
        self.wrong.append(text)

    def heard(self, what: str, path: str) -> None:
        """Hold every rename and removal against the invariants."""
        parts = path.split("/")
        if parts[-1] == "done.json" and what == "rename":
            self.check_end(parts[-2])
        elif what == "unlink" and parts[-1] == "done.json":
            pass
        elif what == "rename" and len(parts) > 2 and parts[-2] == "checkpoint" and parts[-1].startswith("epoch-"):
            key, place = parts[-3], parts[-1]  # the end of an epoch, or a step behind it
            self.published[key, place] += 1
            end = self.end_of(key)
            if end is not None and end.final:
                self.fail(f"{place} of {key[:6]} is kept after the trial's end")
            if self.published[key, place] > 1 and not self.repeats:
                self.fail(f"{place} of {key[:6]} is trained again")
        elif what == "rename" and "studies" in parts:
            self.check_study(path)

    def check_end(self, key: str) -> None:
        """What a trial's end names must lie beside it."""
        end = self.end_of(key)
        if end is None:
            return
        place = f"{HOME}/runs/{key}"
        if self.folder_digest(f"{place}/adapter") != end.adapter_digest:
            self.fail(f"done.json of {key[:6]} names another adapter")
        for name, file in (("metrics_digest", "metrics.jsonl"), ("losses_digest", "losses.jsonl")):
            wanted = getattr(end, name)
            if wanted is not None and self.digest(f"{place}/{file}") != wanted:
                self.fail(f"done.json of {key[:6]} names another {file}")

    def check_study(self, path: str) -> None:
        """Each number of a report must have its score's file, and that the adapter that the trial ended with."""
        text = self.text(path)
        if text is None:
            return
        for cell in StudyFile.parse(text, path, "").cells:
            if cell.status != "done":
                continue
            file = f"{HOME}/evaluations/{cell.evaluation}.json"
            if self.digest(file) != cell.evaluation_digest:
                self.fail(f"the report's cell {cell.row} has no such score")
                continue
            score, end = Evaluation.parse(self.text(file) or b"", file, ""), self.end_of(str(cell.trial))
            if end is None or score.adapter_digest != end.adapter_digest:
                self.fail(f"the report's cell {cell.row} is of another adapter than the trial ended with")

    def check_kept(self, when: str) -> None:
        """What was told must be there."""
        for key in self.world.ended:
            try:
                end = self.end_of(key)
            except HificlError as error:
                self.fail(f"{when} the end of {key[:6]} is damaged: {error}")
                continue
            if end is None and keys()[key].seed not in self.kind.stops and not self.kind.exits:
                self.fail(f"{when} the end of {key[:6]} is lost, which was told")
        for key, epoch in self.world.told.items():
            folder = self.disk.truth(f"{HOME}/runs/{key}/checkpoint")
            names = sorted(folder.entries) if folder is not None else []
            if epoch and (not names or int(names[-1][6:10]) < epoch) and not self.flipped:
                self.fail(f"{when} epoch {epoch} of {key[:6]} is lost, which was told")

    @property
    def flipped(self) -> bool:
        return any("flips" in line for line in self.world.log)

    def result(self) -> dict[str, Any]:
        """Return all that must be as in an undisturbed run."""
        ends = {}
        for key in keys():
            end = self.end_of(key)
            assert end is not None
            digests = ("adapter_digest", "metrics_digest", "losses_digest")
            fields = ("epochs", "chosen_epoch", "objective", *digests) if end.final else ()
            ends[key] = {name: getattr(end, name) for name in ("status", *fields)}
            if end.final:
                curves = [self.text(f"{HOME}/runs/{key}/{name}") for name in ("metrics.jsonl", "losses.jsonl")]
                ends[key]["curves"] = curves
        text = self.text(f"{HOME}/evaluations/studies/{STUDY}.json")
        report = StudyFile.parse(text or b"", "study", "").cells
        return {"ends": ends, "cells": [
            (cell.row, cell.status, cell.value, cell.trial, len(cell.epochs))
            for cell in report if cell.trial is None or keys()[cell.trial].seed not in self.kind.stops
        ]}  # fmt: skip

    def check_all(self, wanted: Mapping[str, Any] | None) -> None:
        for key in keys():
            if self.end_of(key) is None:
                self.fail(f"trial {key[:6]} has no end")
                return
            self.check_end(key)
        self.check_study(f"{HOME}/evaluations/studies/{STUDY}.json")
        result = self.result()
        if wanted is not None and self.kind.exits and self.world.gave_up:
            # the others were compared without one that failed; so one may have stayed that would have left
            stayed = {key for key, end in wanted["ends"].items() if end["status"] == "stopped"}
            stayed = {key for key in stayed if result["ends"][key]["status"] == "finished"}
            result, wanted = (
                {
                    "ends": {key: end for key, end in of["ends"].items() if key not in stayed},
                    "cells": [cell for cell in of["cells"] if key_of(int(cell[0].removeprefix("row"))) not in stayed],
                }
                for of in (result, wanted)
            )
        if wanted is not None and result != wanted:
            for key, end in result["ends"].items():
                for name in end:
                    if end[name] != wanted["ends"][key].get(name):
                        self.fail(f"{name} of {key[:6]} is {end[name]}, not {wanted['ends'][key].get(name)}")
            if result["cells"] != wanted["cells"]:
                self.fail(f"the report has {result['cells']}, not {wanted['cells']}")
        self.check_tracking()

    def check_tracking(self) -> None:
        server, ends = self.server, mlflow_sync.ENDS
        for key in keys():
            runs = [run for run in server.runs.values() if run.data.tags.get("trial_key") == key]
            if len(runs) != 1:
                self.fail(f"trial {key[:6]} has {len(runs)} runs in MLflow")
                continue
            (run,), end = runs, self.end_of(key)
            assert end is not None
            if run.info.status != ends[end.status]:
                self.fail(f"MLflow says that {key[:6]} is {run.info.status}, not {ends[end.status]}")
            points = Counter((point.key, point.step) for point in server.points[run.info.run_id])
            twice = [point for point, count in points.items() if count > 1 and not point[0].startswith("test_")]
            if twice and not self.kind.two:
                self.fail(f"MLflow has {twice[:3]} of {key[:6]} twice")
            steps = {step for name, step in points if name == "selection_score"}
            if end.final and steps != set(range(1, (end.epochs or 0) + 1)):
                self.fail(f"MLflow has the epochs {sorted(steps)} of {key[:6]}, not {end.epochs}")
            if end.adapter_digest is not None and run.data.tags.get("adapter_digest") != end.adapter_digest:
                self.fail(f"MLflow has another adapter of {key[:6]}")
        left = [run.info.run_id for run in server.runs.values() if run.info.status == "RUNNING"]
        if left:
            self.fail(f"{len(left)} runs are left RUNNING")

    def go(self, wanted: Mapping[str, Any] | None) -> Outcome:
        world, began = self.world, Now.real_clock()
        problem: str | None = None
        with turned(world, self.files, self.cluster, self.server):
            operators = []
            try:
                if self.kind.faults:
                    Trouble(self)
                for who in range(2 if self.kind.two else 1):
                    operator = Process(world, self.home, "operator")
                    operator.spawn(self.operate, who, main=True)
                    operators.append(operator)

                def done() -> bool:
                    return len(self.ready) == len(operators) or bool(self.wrong)

                if not world.run(done, self.kind.span):
                    self.calm()
                    if not world.run(done, max(0.0, self.until - world.now)):
                        self.quiet = True
                        world.say("nothing disturbs any more")
                    if not world.run(done, SECONDS):
                        self.fail(f"no end within {SECONDS:.0f} s with nothing in its way")
                if not self.wrong:
                    world.run(lambda: False, 300)  # what was frozen thaws, what was cut off comes back
                    self.check_all(wanted)
            except (Violation, Stuck, HificlError) as error:  # the last: a record that is damaged at the end
                self.fail(str(error))
            finally:
                world.current = None
                if world.unforeseen:
                    self.wrong.insert(0, "".join(traceback.format_exception(world.unforeseen[0])[-6:]).strip())
                for process in list(world.processes.values()):
                    process.end(-9)
                while world.dead:
                    world._finish_off(world.dead.pop())
        problem = self.wrong[0] if self.wrong else None
        faults = Counter(line.partition("FAULT: ")[2].split(" for ")[0] for line in world.log if "FAULT: " in line)
        return Outcome(self.seed, problem, Now.real_clock() - began, world.count, faults, world.log)

    def calm(self) -> None:
        """Let nothing new disturb; what is frozen or cut off comes back by itself."""
        self.over = True
        self.world.strikes.clear()
        self.disk.full, self.disk.sick = False, None
        self.server.away, self.server.loses, self.world.proxies_die = False, 0.0, 0.0


Now.real_clock = staticmethod(time.process_time)


@functools.cache
def undisturbed(stops: frozenset[int], diverges: int | None, poison: int | None, exits: bool = False) -> dict[str, Any]:
    """Return the result of a sweep that nothing disturbs."""
    run = Run(0, Kind(stops=stops, diverges=diverges, poison=poison, exits=exits))
    outcome = run.go(None)
    assert outcome.problem is None, outcome.problem
    return run.result()


def play(seed: int, *, verbose: bool = False) -> Outcome:
    """Run the schedule of a seed."""
    kind = Kind.drawn(seed)
    wanted = undisturbed(kind.stops, kind.diverges, kind.poison, kind.exits)
    return Run(seed, verbose=verbose).go(wanted)
