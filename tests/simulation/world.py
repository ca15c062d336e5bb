"""Virtual time and the processes in it: every one a greenlet that gives way at each file operation, sleep and message.

A `World` decides from its seed alone who goes on, so a schedule is the same every time. Nothing here waits for real.
"""

from __future__ import annotations

import asyncio
import heapq
import random
import selectors
from collections import deque
from collections.abc import Callable
from typing import Any

import greenlet


class Killed(SystemExit):
    """What SIGKILL is here; a SystemExit, because asyncio lets that pass."""


class Stuck(Exception):
    """The schedule does not end within what it was given."""


class Host:
    """A machine: its clock, which may jump, and whether it is cut off from the others."""

    def __init__(self, world: World, name: str) -> None:
        self.world, self.name = world, name
        self.clock_offset = 1.7e9
        self.boot = 0
        self.cut_off = False  # from the other machines
        self.cut_from_disk = False
        self.up = True
        self.drained = False  # it is to be taken away, and has said so

    def __repr__(self) -> str:
        return self.name


class Process:
    """What is killed and frozen as one: some strands, their open files, their process id."""

    def __init__(self, world: World, host: Host, name: str, mark: str | None = None) -> None:
        self.world, self.host, self.name, self.mark = world, host, name, mark
        world.pids += 1
        self.pid, self.alive, self.frozen_until = world.pids, True, 0.0
        self.started, self.status = f"{world.now:.6f}", 0
        self.strands: list[Strand] = []
        self.files: set[Any] = set()
        self.ended: list[Callable[[], None]] = []  # who is told of its end
        self.starved_until = 0.0  # of file descriptors
        world.processes[self.pid] = self

    def __repr__(self) -> str:
        return f"{self.name}[{self.pid}]@{self.host}"

    def spawn(self, work: Callable[..., Any], *args: Any, main: bool = False) -> Strand:
        return Strand(self, work, args, main=main)

    def end(self, status: int = 0) -> None:
        """End it by itself or from outside: its strands go no further, its files are closed, its peers hear of it."""
        if not self.alive:
            return
        self.alive, self.status = False, status
        for file in sorted(self.files, key=lambda file: file.number):
            file.close_by_kernel()
        self.files.clear()
        for strand in self.strands:
            self.world.discard(strand)
        for told in self.ended:
            told()


class Strand:
    """A thread of a process, or the main one, with which it ends."""

    def __init__(self, process: Process, work: Callable[..., Any], args: tuple[Any, ...], *, main: bool) -> None:
        self.process, self.main = process, main
        self.loop: Any = None  # asyncio's, that runs in it
        self.token = 0  # of the wake-up that counts
        self.done = False

        def run() -> None:
            try:
                work(*args)
            except Killed:
                pass
            finally:
                self.done = True
            if main and process.alive:
                process.end()

        self.greenlet = greenlet.greenlet(run, process.world.hub)
        process.strands.append(self)
        process.world.wake(self, 0.0)


class World:
    """The clock, who is waiting for what, and the dice.

    Args:
        seed: of all dice.
        limit: operations after which the schedule is given up.
    """

    def __init__(self, seed: int, limit: int = 50_000) -> None:
        self.rng, self.limit = random.Random(seed), limit
        self.now, self.count, self.pids, self.sequence = 0.0, 0, 100, 0
        self.queue: list[tuple[float, int, Any, int]] = []
        self.processes: dict[int, Process] = {}
        self.hub = greenlet.getcurrent()
        self.current: Strand | None = None
        self.log: list[str] = []
        self.verbose = False
        self.strikes: dict[int, Callable[[Process], None]] = {}  # faults by the number of an operation
        self.dead: list[Strand] = []

    # -- what happens --------------------------------------------------------------------------------------------------

    def say(self, text: str) -> None:
        who = f"{self.current.process!r}" if self.current else "-"
        self.log.append(f"{self.now:10.4f} {who:24} {text}")
        if self.verbose:
            print(self.log[-1], flush=True)

    def at(self, delay: float, call: Callable[[], None]) -> None:
        """Let something happen outside all processes."""
        self.sequence += 1
        heapq.heappush(self.queue, (self.now + delay, self.sequence, call, -1))

    def wake(self, strand: Strand, delay: float) -> None:
        """Let a strand go on; of several wake-ups the last that was asked for counts."""
        self.sequence += 1
        strand.token += 1
        heapq.heappush(self.queue, (self.now + delay, self.sequence, strand, strand.token))

    def run(self, until: Callable[[], bool], seconds: float) -> bool:
        """Let everything happen until a condition holds; return whether it does within so many seconds."""
        stop = self.now + seconds
        while not until():
            if not self.queue:
                return False
            time, number, what, token = heapq.heappop(self.queue)
            if time > stop:
                heapq.heappush(self.queue, (time, number, what, token))
                self.now = stop
                return False
            self.now = max(self.now, time)
            if token == -1:
                self.current = None
                what()
            elif not what.done and what.token == token:
                self._resume(what)
            while self.dead:
                self._finish_off(self.dead.pop())
        return True

    def _resume(self, strand: Strand) -> None:
        process = strand.process
        if process.frozen_until > self.now:
            self.sequence += 1
            heapq.heappush(self.queue, (process.frozen_until, self.sequence, strand, strand.token))
            return
        if not process.alive:
            return
        self.current = strand
        if strand.loop is not None:
            asyncio._set_running_loop(strand.loop)
        strand.greenlet.switch()
        asyncio._set_running_loop(None)
        self.current = None

    def discard(self, strand: Strand) -> None:
        if not strand.done:
            self.dead.append(strand)

    def _finish_off(self, strand: Strand) -> None:
        """Unwind a dead process's strand; whatever it still tries is refused."""
        while not strand.done:
            if not strand.greenlet:  # has not begun
                strand.done = True
                return
            self.current = strand
            asyncio._set_running_loop(strand.loop)
            strand.greenlet.throw(Killed)
            asyncio._set_running_loop(None)
            self.current = None

    # -- what a process does -------------------------------------------------------------------------------------------

    @property
    def process(self) -> Process:
        assert self.current is not None, "no process runs"
        return self.current.process

    def pause(self) -> None:
        """Give way until woken."""
        strand = self.current
        assert strand is not None
        if not strand.process.alive:
            raise Killed
        self.hub.switch()
        if not strand.process.alive:
            raise Killed

    def sleep(self, seconds: float) -> None:
        """Give way for some seconds of virtual time."""
        strand = self.current
        assert strand is not None, "no process runs"
        process = strand.process
        if not process.alive:
            raise Killed
        self.count += 1
        if self.count > self.limit:
            raise Stuck(f"{self.limit} operations and no end")
        if self.strikes and (strike := self.strikes.pop(self.count, None)) is not None:
            strike(process)
            if not process.alive:
                raise Killed
        if seconds < 0.0:
            seconds = 0.0
        if process.frozen_until <= self.now and (not self.queue or self.now + seconds < self.queue[0][0]):
            self.now += seconds  # nobody else's turn
            return
        self.wake(strand, seconds)
        self.pause()


class Signal:
    """Something that strands wait for: as threading.Event, in virtual time."""

    def __init__(self, world: World) -> None:
        self.world, self.waiting, self.on = world, [], False

    def set(self) -> None:
        self.on = True
        for strand in self.waiting:
            if not strand.done:
                self.world.wake(strand, 0.0)
        self.waiting.clear()

    def is_set(self) -> bool:
        return self.on

    def wait(self, timeout: float | None = None) -> bool:
        if self.on:
            return True
        strand = self.world.current
        self.waiting.append(strand)
        if timeout is not None:
            self.world.wake(strand, timeout)
        self.world.pause()
        if strand in self.waiting:
            self.waiting.remove(strand)
        return self.on


class Thread:
    """As threading.Thread: a strand of the process that starts it."""

    def __init__(self, world: World, target: Callable[..., Any], args: tuple[Any, ...] = ()) -> None:
        self.world, self.target, self.args = world, target, args

    def start(self) -> None:
        self.world.process.spawn(self.target, *self.args)


class Pipe:
    """One end of a two-way pipe between processes of one machine: as multiprocessing's Connection."""

    def __init__(self, world: World) -> None:
        self.world, self.inbox, self.closed = world, deque(), False
        self.peer: Pipe = self
        self.news: list[Strand] = []

    @classmethod
    def pair(cls, world: World) -> tuple[Pipe, Pipe]:
        left, right = cls(world), cls(world)
        left.peer, right.peer = right, left
        return left, right

    def send(self, message: Any) -> None:
        self.world.sleep(self.world.rng.uniform(0, 1e-3))
        if self.closed or self.peer.closed:
            raise BrokenPipeError("the other end is gone")
        self.peer.inbox.append(message)
        self.peer._wake()

    send_bytes = send

    def _wake(self) -> None:
        for strand in self.news:
            if not strand.done:
                self.world.wake(strand, 1e-4)
        self.news.clear()

    def poll(self, timeout: float) -> bool:
        if not self.inbox and not self.peer.closed:
            strand = self.world.current
            self.news.append(strand)
            self.world.wake(strand, timeout)
            self.world.pause()
            if strand in self.news:
                self.news.remove(strand)
        return bool(self.inbox) or self.peer.closed

    def recv(self) -> Any:
        while not self.inbox:
            if self.peer.closed:
                raise EOFError
            self.poll(1e6)
        return self.inbox.popleft()

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            self.peer._wake()


class _Selector(selectors.BaseSelector):
    """Waits in virtual time in the place of sockets."""

    def __init__(self, loop: Loop) -> None:
        self.loop = loop

    def select(self, timeout: float | None = None) -> list[Any]:
        loop, world = self.loop, self.loop.world
        if timeout is not None and timeout <= 0:
            return []
        if loop.poked:
            loop.poked = False
            return []
        if timeout is not None:
            world.wake(loop.strand, timeout)
        else:
            loop.strand.token += 1  # nothing but a poke wakes it
        loop.waits = True
        world.pause()
        loop.waits, loop.poked = False, False
        return []

    def register(self, *_: Any, **__: Any) -> Any: ...
    def unregister(self, *_: Any, **__: Any) -> Any: ...
    def get_map(self) -> Any: ...


class Loop(asyncio.BaseEventLoop):
    """asyncio's loop in virtual time, in the strand that runs it."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self.world, self.strand = world, world.current
        self.waits = self.poked = False
        self._selector = _Selector(self)
        self._clock_resolution = 1e-9

    def time(self) -> float:
        return self.world.now

    def _process_events(self, event_list: Any) -> None: ...

    def _write_to_self(self) -> None: ...

    def poke(self, call: Callable[[], None]) -> None:
        """Let something happen in the loop, from outside of it."""
        self._ready.append(asyncio.Handle(call, (), self))
        if self.waits:
            self.world.wake(self.strand, 0.0)
        else:
            self.poked = True

    def run(self, work: Any) -> Any:
        """Run a coroutine to its end."""
        self.strand.loop = self
        task = self.create_task(work)
        task.add_done_callback(lambda _: self.stop())
        asyncio._set_running_loop(None)
        try:
            self.run_forever()
        finally:
            self.strand.loop = None
        return task.result()
