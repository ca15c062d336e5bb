"""How long the processes of a sweep wait for each other before one is taken for lost.

In one place because they hang together: who is further up waits longer than who is below, so that a loss is named by
the process that saw it, and `kill -9` of dvc leaves no process 10 s later.
"""

from __future__ import annotations

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
