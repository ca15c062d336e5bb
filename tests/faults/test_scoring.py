"""The stage that scores is stopped: it ends in order too, and what it had scored is kept."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest

from tests.faults.checks import nothing_left, survived
from tests.faults.sweeps import Sweep
from tests.faults.test_processes import ORPHAN_SECONDS

pytestmark = [pytest.mark.faults, pytest.mark.timeout(900)]

STAGE = ("-m", "stages.evaluate")
DVC = ("-m", "dvc", "repro", "-s", "evaluate")


@pytest.fixture
def scoring(trained: Sweep, tmp_path: Path):
    """`scoring(*words)` starts the stage on a copy and returns that when its evaluators are there."""
    started = []

    def begin(*words: str) -> Sweep:
        made = trained.copy(tmp_path / "scoring")
        started.append(made)
        made.remember()
        made.begin(*words)
        made.until(lambda: made.processes("ray::Evaluator"), "an evaluator")
        return made

    yield begin
    for made in started:
        made.clean_up()


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_a_signal(scoring, reference, fault, how):
    sweep = scoring(*STAGE)
    sweep.stage.send_signal(how)
    started = time.monotonic()
    assert sweep.ended(30) == 130 and "run the same command again" in sweep.log
    assert "SIGTERM received" not in sweep.log and "Traceback" not in sweep.log, sweep.log
    gone = time.monotonic() - started + nothing_left(sweep, 1)
    sweep.again(*STAGE)
    survived(sweep, reference)
    fault(f"{how.name} while it scores", gone=gone)


def test_dvc(scoring, reference, fault):
    sweep = scoring(*DVC)
    sweep.stage.kill()
    gone = nothing_left(sweep, ORPHAN_SECONDS)
    sweep.stage.wait()
    sweep.again(*DVC)
    survived(sweep, reference)
    fault("dvc while it scores", gone=gone)
