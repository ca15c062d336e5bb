"""The processes of a sweep: how they are found and ended, by signals too, and how long they wait.

The limits are in one place because they hang together: who is further up waits longer than who is below, so that a loss
is named by the process that saw it, and `kill -9` of dvc leaves no process 10 s later.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from pipeline.config.load import Sweep

# -- the dispatcher, which watches its slots
STEP_SECONDS = 5.0  # between two looks at a working slot's step counter
BUILD_SECONDS = 300.0  # a slot that takes longer to start is given up

# -- the driver, which watches its cluster
LIFE_SECONDS = 2.0  # between two signs of life: short beside every limit here, and rare enough to cost nothing
CLUSTER_SECONDS = 60.0  # a cluster that does not answer: Ray itself gives up a head after as long
NODES_SECONDS = 300.0  # for a cluster's nodes, where no slot fits those that are there
GROW_SECONDS = 30.0  # between two looks for nodes that have joined
LEND_SECONDS = 0.5  # between two looks for slots that have nothing to train
BACK_SECONDS = 0.05  # between two looks whether one that was lent is back
ENDING_SECONDS = 4.0  # an ordered end, which takes 1 to 2 s; then everything is killed

# -- the stage, which watches the driver
POLL_SECONDS = 0.5  # between two looks at the journal, so that a loss is printed at once
HELD_SECONDS = 1.0  # between two looks at who holds the store, each a file made and removed
DRIVER_SECONDS = 2 * CLUSTER_SECONDS  # without a sign of life: the driver would have said by then that Ray is silent
STARTING_SECONDS = 600.0  # until the first sign, which comes after Ray's start: 120 s a process on a busy machine
AGAIN_SECONDS = 20.0  # before another driver, once two in turn did nothing: a head comes back in so long; then 40, ...
STOPPING_SECONDS = ENDING_SECONDS + 2  # for the driver to end by itself, its killing included
PARENT_SECONDS = 1.0  # between two looks at dvc; with STOPPING_SECONDS 7 s, below the 10 s that are promised

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # the last: its terminal was closed, or ssh has ended
KEEPING = signal.SIGUSR1  # ends too, with the last step kept: SLURM's word some time before it ends a job
KEEP_SECONDS = "HIFICL_KEEP_SECONDS"  # in the environment: how long that may take
MARK = "HIFICL_SWEEP"  # in the environment of all processes of one driver
REAPING = 10  # passes: what is killed may have started another in between


def worker_environment(sweep: Sweep) -> dict[str, str]:
    """Return the variables of a worker: its threads; where it asks for no GPU, that there is none.

    Ray leaves a machine's GPUs visible to an actor that asks for none, and whatever asks torch would take one.
    """
    hidden = {} if sweep.gpus_per_worker else {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    return {"OMP_NUM_THREADS": str(sweep.threads_per_worker), **hidden}


def alive(process: psutil.Process) -> bool:
    """Whether a process runs; one that was killed and that nobody has waited for does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def marked(mark: str) -> list[psutil.Process]:
    """Return the processes whose environment has the mark."""
    processes = []
    for process in psutil.process_iter():
        try:
            if process.status() != psutil.STATUS_ZOMBIE and process.environ().get(MARK) == mark:
                processes.append(process)
        except psutil.Error:
            continue
    return processes


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


_heard: list[int] = []  # the signals of this block
_keep: list[float] = []  # seconds, once somebody was told to keep the last step


def allow_keeping(seconds: float) -> None:
    """Let trials that are ended have so long to keep their last step."""
    _keep[:] = [seconds]


def keep_seconds() -> float:
    """Return how long trials that are ended have to keep their last step; 0: they are ended at once."""
    return sum(_keep)


@contextmanager
def in_order() -> Iterator[None]:
    """End the block with KeyboardInterrupt at a signal (`as_interrupt`), and when the `dvc` above is gone."""
    with as_interrupt(), _ended_with_parent():
        yield


@contextmanager
def as_interrupt() -> Iterator[None]:
    """Turn the signals that end a process into KeyboardInterrupt for the time of the block (`ENDING`, `KEEPING`).

    Python drops an exception that a handler raises while a finaliser or a weak reference's callback runs. So the signal
    is noted too, and the sweep's loop asks with `raise_dropped_interrupt` whether one was dropped; nothing is printed.
    """

    def interrupt(number: int, *_: Any) -> None:
        _heard.append(number)
        if number == KEEPING:
            allow_keeping(float(os.environ.get(KEEP_SECONDS, "60")))
        raise KeyboardInterrupt

    def dropped(unraisable: sys.UnraisableHookArgs) -> None:
        if unraisable.exc_type is not KeyboardInterrupt:
            before(unraisable)

    before = sys.unraisablehook
    with kept_handlers() as handlers, ExitStack() as stack:
        _heard.clear()
        _keep.clear()
        sys.unraisablehook = dropped
        stack.callback(setattr, sys, "unraisablehook", before)
        stack.callback(_heard.clear)  # or the next loop in this process would take it for its own
        for number, handler in handlers.items():
            if handler is not signal.SIG_IGN:  # as a shell does with SIGINT for the background, and nohup with SIGHUP
                signal.signal(number, interrupt)
        yield


@contextmanager
def kept_handlers() -> Iterator[dict[int, Any]]:
    """Put the handlers of those signals back at the end of the block, whoever sets others in it.

    Yields:
        The handlers by signal; none outside the main thread, where nobody may set any.
    """
    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.getsignal(number) for number in (*ENDING, KEEPING)}
    try:
        yield dict(before)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)


def raise_dropped_interrupt() -> None:
    """Raise the KeyboardInterrupt of a signal whose own one was dropped."""
    if _heard:
        _heard.clear()
        raise KeyboardInterrupt


@contextmanager
def _ended_with_parent() -> Iterator[None]:
    """End this process when the `dvc` above it is killed, which would leave it as an orphan beside a second sweep."""
    ancestors = psutil.Process().parents()
    dvc = next((p for p in ancestors if any("dvc" in Path(part).name for part in _cmdline(p)[:3])), None)
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(PARENT_SECONDS):
            if dvc is not None and not alive(dvc):
                os.kill(os.getpid(), signal.SIGTERM)
                return

    if dvc is not None:
        threading.Thread(target=watch, daemon=True, name="watch-dvc").start()
    try:
        yield
    finally:
        stop.set()


def _cmdline(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []
