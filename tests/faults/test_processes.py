"""Processes of a sweep are killed: each kind once, with the signal that leaves them no time."""

from __future__ import annotations

import os
import signal
import time

import pytest

from tests.faults.checks import nothing_left, survived
from tests.faults.sweeps import EPOCHS

pytestmark = [pytest.mark.faults, pytest.mark.timeout(900)]

# how Ray titles the processes of Tune's actors: after the class that `tune.with_resources` puts around `TrialProxy`
TRIALS_ACTOR = "ray::ResourceTrainable"
AGAIN_SECONDS = 15.0  # in which a trial trains again whose worker died
ORPHAN_SECONDS = 10.0


def again_after(sweep, killed: float) -> float:
    """Seconds from the kill to the moment when a trial was taken up again at its checkpoint."""
    events = sweep.until(lambda: [e for e in sweep.events("trial trains again") if e["time"] > killed], "a new start")
    return round(events[0]["time"] - killed, 1)


def next_epoch_after(sweep, killed: float) -> float:
    """Seconds from the kill to a new slot's first checkpoint; the old worker may end an epoch before it is killed."""
    built = sweep.until(lambda: [e for e in sweep.events("slot built") if e["time"] > killed], "a new slot")[0]["time"]

    def newest() -> float:
        return max((p.stat().st_mtime for p in sweep.runs.glob("*/checkpoint/epoch-*/state.json")), default=0)

    return round(sweep.until(lambda: newest() if newest() > built else 0, "a new checkpoint") - killed, 1)


def test_a_worker(sweep, reference, fault):
    sweep.begin()
    sweep.midway()
    (worker,) = sweep.workers()
    os.kill(worker, signal.SIGKILL)
    killed = time.time()
    seconds = again_after(sweep, killed)
    assert sweep.ended() == 0, sweep.log
    survived(sweep, reference)
    lost = sweep.events("slot lost")
    assert len(lost) == 1 and "a worker died" in lost[0]["why"] and "slot lost" in sweep.log
    assert len(sweep.events("slot built")) == 2
    assert sweep.events("trial trains again")[0]["after_epoch"] >= 1 or len(sweep.seen_done) > 1
    assert seconds < AGAIN_SECONDS
    fault("worker", again=seconds)


def test_a_trials_actor(sweep, reference, fault):
    """Ray Tune's actor of a trial: it only waits, so the training behind it is not disturbed."""
    sweep.begin()
    sweep.midway()
    sweep.until(lambda: sweep.processes(TRIALS_ACTOR), "a trial's actor")  # a new one is "ray::IDLE" for a moment
    sweep.kill(TRIALS_ACTOR)
    assert sweep.ended() == 0, sweep.log
    survived(sweep, reference)
    assert len(sweep.events("slot built")) == 1  # no worker was touched
    fault("actor")


@pytest.mark.parametrize(
    ("part", "kind"),
    [
        ("raylet/raylet", "raylet"),
        ("gcs/gcs_server", "head"),
        ("pipeline.pool.driver", "driver"),
        ("ray::Dispatcher", "dispatcher"),
    ],
)
def test_ray_itself(sweep, reference, fault, part, kind):
    sweep.begin()
    sweep.midway()
    killed = sweep.kill(part)
    seconds = next_epoch_after(sweep, killed)
    assert sweep.ended() == 0, sweep.log
    survived(sweep, reference)
    if kind == "dispatcher":
        last = [line for line in sweep.log.splitlines() if line.startswith("trials:")][-1]
        assert last.startswith("trials: 4 of 4 done") and "failed" not in last, sweep.log
        assert "Traceback" not in sweep.log, sweep.log
    (lost,) = sweep.events("the driver of stage train is lost")
    assert lost["attempt"] == 1
    fault(kind, again=seconds)


def test_the_stage(interrupted, resumed, reference, fault):
    before = len(resumed.seen_done)
    assert 1 <= before < 4
    resumed.again()
    survived(resumed, reference)
    fault("stage")


def test_dvc(sweep, reference, fault):
    sweep.begin("-m", "dvc", "repro", "-s", "train")
    sweep.midway()
    sweep.stage.kill()
    gone = nothing_left(sweep, ORPHAN_SECONDS)
    sweep.stage.wait()
    sweep.remember()
    sweep.again("-m", "dvc", "repro", "-s", "train")
    survived(sweep, reference)
    fault("dvc", gone=gone)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_a_signal(sweep, reference, fault, how):
    sweep.begin()
    sweep.midway()
    sweep.stage.send_signal(how)
    started = time.monotonic()
    assert sweep.ended(30) == 130 and "run the same command again" in sweep.log
    gone = time.monotonic() - started + nothing_left(sweep, 1)
    sweep.remember()
    sweep.again()
    survived(sweep, reference)
    fault(how.name, gone=gone)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_signal_as_it_starts(sweep, how):
    """Its driver has a cluster by then, and no work: the stage is still at its imports."""
    sweep.begin()
    sweep.until(lambda: sweep.processes("gcs/gcs_server"), "Ray's first process")
    assert not list(sweep.runs.glob("*/config.json"))
    sweep.stage.send_signal(how)
    assert sweep.ended(30) == (130 if how == signal.SIGINT else -how)
    nothing_left(sweep, ORPHAN_SECONDS)
    assert "Traceback" not in sweep.log, sweep.log


def test_two_at_once(sweep, reference, fault):
    sweep.begin("-m", "dvc", "repro", "-s", "train")
    first = sweep.stage
    sweep.until(lambda: list(sweep.runs.glob("*/config.json")), "the first trial")
    second = sweep.begin("-m", "dvc", "repro", "-s", "train", log="second.log")
    assert second.wait(60) != 0 and str(first.pid) in (sweep.folder / "second.log").read_text()
    third = sweep.begin("-m", "pipeline", "sweep", log="third.log")
    said = third.wait(60), (sweep.folder / "third.log").read_text()
    stages = [one.pid for one in sweep.processes("stages.train")]
    assert said[0] == 2 and any(f"held by a sweep, pid {pid} " in said[1] for pid in stages), said
    sweep.stage = first
    assert sweep.ended() == 0, sweep.log
    survived(sweep, reference)
    assert all(len(row["rows"]) == EPOCHS for row in reference["results"].values())
    fault("two")
