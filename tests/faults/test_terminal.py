"""Ctrl-C in a terminal: the kernel sends SIGINT to every process of the foreground at once, dvc and stage together."""

from __future__ import annotations

import time

import pytest

from tests.faults.checks import nothing_left, survived
from tests.faults.sweeps import Sweep
from tests.faults.test_processes import ORPHAN_SECONDS
from tests.support.terminal import Terminal

pytestmark = [pytest.mark.faults, pytest.mark.timeout(900)]


def ctrl_c(sweep: Sweep, terminal: Terminal) -> float:
    """Press Ctrl-C; return the seconds until nothing of the sweep is left."""
    terminal.press(b"\x03")
    started = time.monotonic()
    assert sweep.ended(30) != 0
    nothing_left(sweep, ORPHAN_SECONDS)
    gone = time.monotonic() - started
    shown = terminal.close()
    assert "run the same command again" in shown and "Traceback" not in shown, shown
    return gone


@pytest.mark.parametrize("stage", ["train", "evaluate"])
def test_ctrl_c(request, tmp_path, reference, fault, stage):
    words = ("-m", "dvc", "repro", "-s", stage)
    sweep = request.getfixturevalue("template" if stage == "train" else "trained").copy(tmp_path / "sweep")
    try:
        sweep.remember()
        terminal = Terminal(words, sweep.folder, sweep.environment, sweep.folder / "started.log")
        sweep.stage = terminal.process
        if stage == "train":
            sweep.midway()
        else:
            sweep.until(lambda: sweep.processes("ray::Evaluator"), "an evaluator")
        gone = ctrl_c(sweep, terminal)
        assert gone < ORPHAN_SECONDS
        sweep.remember()
        sweep.again(*words)
        survived(sweep, reference)
        fault("Ctrl-C" if stage == "train" else "Ctrl-C while it scores", gone=gone)
    finally:
        sweep.clean_up()
