"""A start compares the trials that are done with MLflow, and looks closer only where something is missing."""

from __future__ import annotations

import pytest

from pipeline.records.epoch import EpochReport
from pipeline.records.trial import TrialEnd
from pipeline.sweep.logbook import Logbook
from pipeline.sweep.store import TrialStore
from pipeline.tracking.runs import FINISHED, KILLED, Tracker
from tests.support.plans import make_plan


@pytest.fixture
def made(tmp_path):
    plan = make_plan(tmp_path, 4)
    store = TrialStore(plan.places.runs)
    for key, config in plan.trials.items():
        store.open(config)
        store.trial(key).write_epochs([EpochReport(epoch=1, train_loss=0.5)])
        store.finish(key, TrialEnd(status="finished", epochs=1))
    return tmp_path, plan, store


def opened(made) -> tuple[Tracker, Logbook]:
    where, plan, store = made
    tracker = Tracker(f"sqlite:///{where / 'mlflow.db'}", where)
    tracker.prepare(["study"])
    parent = tracker.open_sweep("study", tags={"sweep_key": "k"}, description="")
    return tracker, Logbook(tracker, store, plan, {"study": parent})


def test_what_mlflow_has_is_passed_over_and_what_it_lacks_is_mended(made):
    _, plan, store = made
    whole, stopped, killed, missing = plan.trials
    tracker, logbook = opened(made)
    store.finish(stopped, TrialEnd(status="stopped", epochs=1))
    logbook.record_done({whole, stopped})
    tracker.close(logbook._open(killed), KILLED)  # a crash between the trial's end and its run's
    tracker, again = opened(made)
    again.record_done(set(plan.trials))
    assert set(again._runs) == {stopped, killed, missing}
    runs = tracker.ended_trials("study", again.parents["study"])
    assert {key: status for key, (status, _) in runs.items()} == {
        whole: FINISHED, stopped: KILLED, killed: FINISHED, missing: FINISHED,
    }  # fmt: skip
    assert tracker.read_run(tracker.find_run(killed))["metrics"]["train_loss"] == 0.5
