"""Ctrl-C in a terminal: the kernel sends SIGINT to every process of the foreground at once, dvc and stage together."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
import threading
import time
from functools import partial

import pytest

from tests.faults.checks import nothing_left, survived
from tests.faults.sweeps import Sweep
from tests.faults.test_processes import ORPHAN_SECONDS

pytestmark = [pytest.mark.faults, pytest.mark.timeout(900)]

# the terminal has to be the session's own, or a key would signal nobody
LOGIN = "import os, sys; os.login_tty(0); os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"


class Terminal:
    """A command of a sweep's folder in a terminal of its own; what it shows goes into the sweep's log."""

    def __init__(self, sweep: Sweep, *words: str) -> None:
        self.sweep = sweep
        self._keys, theirs = pty.openpty()
        sweep.stage = subprocess.Popen(
            [sys.executable, "-c", LOGIN, *words], cwd=sweep.folder, stdin=theirs, stdout=theirs, stderr=theirs,
            env={**sweep.environment, "TERM": "xterm-256color"},
        )  # fmt: skip
        os.close(theirs)
        self._log = (sweep.folder / "started.log").open("wb", buffering=0)
        self._copied = threading.Thread(target=self._copy, daemon=True)
        self._copied.start()

    def _copy(self) -> None:
        try:
            while part := os.read(self._keys, 65536):
                self._log.write(part)
        except OSError:  # the other end is closed
            pass

    def ctrl_c(self) -> float:
        """Press Ctrl-C; return the seconds until nothing of the sweep is left."""
        os.write(self._keys, b"\x03")
        started = time.monotonic()
        assert self.sweep.ended(30) != 0
        nothing_left(self.sweep, ORPHAN_SECONDS)
        gone = time.monotonic() - started
        self._copied.join(10)
        for left in (self._log.close, partial(os.close, self._keys)):
            left()
        assert "run the same command again" in self.sweep.log and "Traceback" not in self.sweep.log, self.sweep.log
        return gone


@pytest.mark.parametrize("stage", ["train", "evaluate"])
def test_ctrl_c(request, tmp_path, reference, fault, stage):
    words = ("-m", "dvc", "repro", "-s", stage)
    sweep = request.getfixturevalue("template" if stage == "train" else "trained").copy(tmp_path / "sweep")
    try:
        sweep.remember()
        terminal = Terminal(sweep, *words)
        if stage == "train":
            sweep.midway()
        else:
            sweep.until(lambda: sweep.processes("ray::Evaluator"), "an evaluator")
        gone = terminal.ctrl_c()
        assert gone < ORPHAN_SECONDS
        sweep.remember()
        sweep.again(*words)
        survived(sweep, reference)
        fault("Ctrl-C" if stage == "train" else "Ctrl-C while it scores", gone=gone)
    finally:
        sweep.clean_up()
