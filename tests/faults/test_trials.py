"""Single trials go wrong: no memory, no progress, no finite loss, and one that fails whatever is done."""

from __future__ import annotations

import os
import resource
import signal
import time

import psutil
import pytest

from tests.faults.checks import mlflow_problems, nothing_left, report, results, survived
from tests.faults.sweeps import set_sweep

pytestmark = [pytest.mark.faults, pytest.mark.timeout(900)]


def test_no_memory(sweep, reference, fault):
    """The worker's address space may not grow any more (RLIMIT_AS) while it loads what it trains."""
    sweep.begin()
    (worker,) = sweep.until(sweep.workers, "the first worker")
    limited = time.time()
    resource.prlimit(worker, resource.RLIMIT_AS, (psutil.Process(worker).memory_info().vms,) * 2)
    assert sweep.ended() == 0, sweep.log
    survived(sweep, reference)
    assert [event for event in sweep.events("slot lost") if event["time"] > limited]
    assert len(sweep.events("slot built")) == 2
    again = sweep.events("trial trains again")
    fault("memory", again=again[0]["time"] - limited)


def test_a_worker_that_hangs(sweep, reference, fault):
    set_sweep(sweep, retry={"hang_seconds": 20})
    sweep.begin()
    sweep.midway()
    (worker,) = sweep.workers()
    os.kill(worker, signal.SIGSTOP)
    stopped = time.time()
    sweep.until(lambda: not psutil.pid_exists(worker), "the end of the stopped worker")
    assert sweep.ended() == 0, sweep.log
    survived(sweep, reference)
    (lost,) = sweep.events("slot lost")
    assert "did not answer" in lost["why"] or "no step" in lost["why"]
    again = sweep.events("trial trains again")[0]["time"] - stopped
    fault("hang", again=again)


def test_a_loss_that_is_not_finite(sweep, reference, fault):
    wild = {"method": "hificl", "rank": 3, "learning_rate": 1e30}
    sweep.change(lambda raw: raw["studies"]["small"]["methods"].update(wild=wild))
    sweep.again()
    nothing_left(sweep)
    found = results(sweep)
    (key,) = found.keys() - reference["results"].keys()
    lost = found.pop(key)
    assert found == reference["results"] and lost["status"] == "diverged"
    assert "not finite at step" in sweep.ends()[key]["error"]
    ends = {**dict.fromkeys(reference["results"], "FINISHED"), key: "FAILED"}
    assert mlflow_problems(sweep.folder / "mlflow.db", ends) == []
    assert [row for row in report(sweep, without="wild") if row["method"] != "wild"] == reference["report"]
    fault("diverged")


def test_a_trial_that_keeps_failing(sweep, reference, fault):
    """Its workers are killed as often as `max_attempts` allows, before it ends an epoch."""
    set_sweep(sweep, retry={"max_attempts": 2})
    sweep.begin()
    sweep.midway()
    os.kill(sweep.workers()[0], signal.SIGKILL)
    sweep.until(lambda: len(sweep.events("slot built")) == 2, "the second worker")
    os.kill(sweep.workers()[0], signal.SIGKILL)
    (failed,) = sweep.until(lambda: sweep.events("trial failed"), "the failure")
    assert sweep.ended() == 1
    key = failed["trial"]
    assert "1 of 4 trials failed" in sweep.log and key in sweep.log.strip().splitlines()[-1]
    assert "a worker died" in sweep.log.strip().splitlines()[-1]
    ends = sweep.ends()
    assert ends.pop(key)["status"] == "failed" and [end["status"] for end in ends.values()] == ["finished"] * 3
    states = {**dict.fromkeys(ends, "FINISHED"), key: "FAILED"}
    assert mlflow_problems(sweep.folder / "mlflow.db", states) == []
    sweep.remember()
    sweep.again()
    survived(sweep, reference)
    fault("failing")
