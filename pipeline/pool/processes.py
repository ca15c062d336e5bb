"""The processes of a sweep: how they are found and ended, and how long they wait for each other.

The limits are in one place because they hang together: who is further up waits longer than who is below, so that a loss
is named by the process that saw it, and `kill -9` of dvc leaves no process 10 s later.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress

import psutil

# -- the dispatcher, which watches its slots
STEP_SECONDS = 5.0  # between two looks at a working slot's step counter
BUILD_SECONDS = 300.0  # a slot that takes longer to start is given up

# -- the driver, which watches its cluster
LIFE_SECONDS = 2.0  # between two signs of life: short beside every limit here, and rare enough to cost nothing
CLUSTER_SECONDS = 60.0  # a cluster that does not answer: Ray itself gives up a head after as long
ENDING_SECONDS = 4.0  # an ordered end, which takes 1 to 2 s; then everything is killed

# -- the stage, which watches the driver
POLL_SECONDS = 0.5  # between two looks at the journal, so that a loss is printed at once
DRIVER_SECONDS = 2 * CLUSTER_SECONDS  # without a sign of life: the driver would have said by then that Ray is silent
STARTING_SECONDS = 600.0  # until the first sign, which comes after Ray's start: 120 s a process on a busy machine
STOPPING_SECONDS = ENDING_SECONDS + 2  # for the driver to end by itself, its killing included
PARENT_SECONDS = 1.0  # between two looks at dvc; with STOPPING_SECONDS 7 s, below the 10 s that are promised

MARK = "HIFICL_SWEEP"  # in the environment of all processes of one driver
REAPING = 10  # passes: what is killed may have started another in between


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
