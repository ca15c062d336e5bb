"""The process that drives Ray for a stage: `python -m pipeline.pool.driver PIPE WRITTEN`, started by `pool.supervisor`.

Ray ends or blocks a process whose cluster is gone, and cannot be started again in it. So the process that holds the
trial store's lock and MLflow never imports Ray, and this one may die at any moment: another takes its place.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from queue import SimpleQueue

import psutil

from pipeline.config.schema import Sweep
from pipeline.core.errors import HificlError
from pipeline.pool.messages import NO_MORE, Alive, Message, Work, WorkEnded, WorkLost, WorkRefused
from pipeline.pool.processes import (
    CLUSTER_SECONDS,
    ENDING_SECONDS,
    LIFE_SECONDS,
    MARK,
    alive,
    allow_keeping,
    keep_seconds,
    reap,
)

CLUSTER = ("gcs_server", "raylet")


class Relay:
    """Passes messages on to the stage; whole ones from several threads."""

    def __init__(self, pipe: Connection) -> None:
        self.pipe, self._lock = pipe, threading.Lock()

    def send(self, message: Message) -> None:
        """Send one message."""
        with self._lock, suppress(OSError):  # without a supervisor this process ends by itself
            self.pipe.send(message)


def main(pipe: Connection) -> None:
    """Take the `Sweep` from the pipe and start its cluster, then take each `Work`, do it, and say how it ended."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job has it ignored
    with suppress(EOFError, KeyboardInterrupt):  # the stage's word, or its death: at any moment, Ray's start included
        sweep, works = pipe.recv(), SimpleQueue[bytes]()
        threading.Thread(target=_hear, args=(pipe, works), daemon=True, name="supervisor").start()
        _serve(sweep, works, Relay(pipe))
    with suppress(KeyboardInterrupt):
        reap(os.environ[MARK])
    os._exit(0)  # nothing is left to do, and Python's own way out takes a second


def _serve(sweep: Sweep, works: SimpleQueue[bytes], relay: Relay) -> None:
    from pipeline.pool.cluster import running

    try:
        with running(sweep):
            from pipeline.pool import tuner  # noqa: F401 - as the cluster's start: while the stage opens MLflow
            from pipeline.pool.slot import KeptSlots

            kept = KeptSlots()
            while True:  # until `_hear` interrupts it
                work: Work = ForkingPickler.loads(works.get())
                with _watched(relay):
                    work.run(relay.send, kept)
                relay.send(WorkEnded())
    except HificlError as error:
        relay.send(WorkRefused(error))
    except (Exception, SystemExit) as error:
        relay.send(WorkLost(f"{type(error).__name__}: {error}", traceback.format_exc()))


def _hear(pipe: Connection, works: SimpleQueue[bytes]) -> None:
    """Pass works on until the supervisor's last word, or its death, and end in order, or without it.

    A work is passed on as bytes: to read it imports what it is made of, and no two threads should do that at once.
    """
    with suppress(EOFError, OSError):
        while (work := pipe.recv_bytes()) != NO_MORE:
            works.put(work)
        allow_keeping(pipe.recv().seconds)
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(ENDING_SECONDS + keep_seconds())
    reap(os.environ[MARK])
    os._exit(1)


@contextmanager
def _watched(relay: Relay) -> Iterator[None]:
    """End this process when its cluster is gone: Ray's own calls would wait for it without end."""
    import ray

    here = ray.get_runtime_context().get_node_id()
    children = {process.name(): process for process in psutil.Process().children()}
    processes = {name: children[name] for name in CLUSTER if name in children}  # of a private cluster
    stop = threading.Event()
    heard = time.monotonic()

    def ask() -> None:
        nonlocal heard
        while not stop.wait(LIFE_SECONDS):
            try:
                if any(node["NodeID"] == here and node["Alive"] for node in ray.nodes()):
                    heard = time.monotonic()
            except Exception:  # noqa: S112 - no answer is an answer, and the watch below counts the seconds
                continue

    def watch() -> None:
        while not stop.wait(LIFE_SECONDS / 2):
            dead = [name for name, process in processes.items() if not alive(process)]
            if dead or time.monotonic() - heard > CLUSTER_SECONDS:
                why = f"Ray's {dead[0]} died" if dead else f"Ray did not answer for {CLUSTER_SECONDS:.0f} s"
                relay.send(WorkLost(why))
                reap(os.environ[MARK])
                os._exit(1)
            relay.send(Alive())

    for work in (ask, watch):
        threading.Thread(target=work, daemon=True, name=f"cluster-{work.__name__}").start()
    try:
        yield
    finally:
        stop.set()


def _apart(written: int) -> None:
    """Let Python alone write to the terminal; Ray's C++, and whoever else writes to descriptor 2, into a file."""
    sys.stderr = os.fdopen(os.dup(2), "w", buffering=1, errors="backslashreplace")
    os.dup2(written, 2)


if __name__ == "__main__":
    _apart(int(sys.argv[2]))
    main(Connection(int(sys.argv[1])))
