"""The process that drives Ray for a stage: `python -m pipeline.sweep.driver FD`, started by `sweep.supervisor`.

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
from typing import Any

import psutil

from pipeline.errors import HificlError
from pipeline.records.epoch import EpochReport
from pipeline.sweep.limits import CLUSTER_SECONDS, ENDING_SECONDS, LIFE_SECONDS

STOP = "stop"
PROXY_DIED = "the process that waits for it died"  # the trial itself may be well
MARK = "HIFICL_SWEEP"  # in the environment of all processes of one driver
REAPING = 10  # passes: what is killed may have started another in between
CLUSTER = ("gcs_server", "raylet")


class Relay:
    """A `tuner.Watcher` that passes on what it hears."""

    def __init__(self, pipe: Connection) -> None:
        self.pipe, self._lock = pipe, threading.Lock()

    def send(self, *message: Any) -> None:
        """Send one message; whole ones from several threads."""
        with self._lock, suppress(OSError):  # without a supervisor this process ends by itself
            self.pipe.send(message)

    def on_start(self, key: str) -> None:
        """See `tuner.Watcher`."""
        self.send("on_start", key)

    def on_report(self, key: str, report: EpochReport) -> None:
        """See `tuner.Watcher`."""
        self.send("on_report", key, report)

    def on_end(self, key: str, error: str | None) -> None:
        """See `tuner.Watcher`."""
        self.send("on_end", key, error)


def main(pipe: Connection) -> None:
    """Take a `work.Work` from the pipe, do it, and say how it ended."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job has it ignored
    relay = Relay(pipe)
    import pipeline.sweep.tuner  # noqa: F401 - while the supervisor opens MLflow

    try:
        work = pipe.recv()
    except EOFError:
        return
    if work == STOP:  # before there was work
        return
    threading.Thread(target=_end_with_supervisor, args=(pipe,), daemon=True, name="supervisor").start()
    with suppress(KeyboardInterrupt):  # the stage's word; it may come while the last message is under way
        _do(work, relay)
    with suppress(KeyboardInterrupt):
        reap(os.environ[MARK])
    os._exit(0)  # nothing is left to do, and Python's own way out takes a second


def _do(work: Any, relay: Relay) -> None:
    from pipeline.sweep.tuner import cluster

    try:
        with cluster(work.params.sweep), _watched(relay):
            work.run(relay)
        relay.send("ended")
    except HificlError as error:
        relay.send("error", error)
    except (Exception, SystemExit) as error:
        relay.send("lost", f"{type(error).__name__}: {error}", traceback.format_exc())


def _end_with_supervisor(pipe: Connection) -> None:
    """Wait for the supervisor's word, or for its death, and end in order, or without it."""
    with suppress(EOFError, OSError):
        pipe.recv()
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(ENDING_SECONDS)
    reap(os.environ[MARK])
    os._exit(1)


@contextmanager
def _watched(relay: Relay) -> Iterator[None]:
    """End this process when its cluster is gone: Ray's own calls would wait for it without end."""
    import ray

    here = ray.get_runtime_context().get_node_id()
    own = {one.name(): one for one in psutil.Process().children() if one.name() in CLUSTER}  # of a private cluster
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
            dead = [name for name, one in own.items() if not alive(one)]
            if dead or time.monotonic() - heard > CLUSTER_SECONDS:
                why = f"Ray's {dead[0]} died" if dead else f"Ray did not answer for {CLUSTER_SECONDS:.0f} s"
                relay.send("lost", why, "")
                reap(os.environ[MARK])
                os._exit(1)
            relay.send("alive")

    for work in (ask, watch):
        threading.Thread(target=work, daemon=True, name=f"cluster-{work.__name__}").start()
    try:
        yield
    finally:
        stop.set()


def alive(process: psutil.Process) -> bool:
    """Whether a process runs; one that was killed and that nobody has waited for does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def marked(mark: str) -> list[psutil.Process]:
    """Return the processes whose environment has the mark."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.status() != psutil.STATUS_ZOMBIE and process.environ().get(MARK) == mark:
                found.append(process)
        except psutil.Error:
            continue
    return found


def reap(mark: str) -> None:
    """Kill every process with the mark but this one, agents that have lost their parent included."""
    for _ in range(REAPING):
        left = [process for process in marked(mark) if process.pid != os.getpid()]
        for process in left:
            with suppress(psutil.Error):
                process.kill()
        if not left:
            return
        time.sleep(0.1)


if __name__ == "__main__":
    main(Connection(int(sys.argv[1])))
