"""A sweep from params to a full trial store: what the DVC stage `train` and `hificl sweep` run."""

from __future__ import annotations

import time
from pathlib import Path

from pipeline.config.load import Params
from pipeline.core import copies
from pipeline.core.errors import WorkError
from pipeline.core.progress import say
from pipeline.plan.inputs import all_cells, places
from pipeline.plan.plan import Plan, make_plan
from pipeline.plan.unheard import unheard
from pipeline.pool.processes import in_order
from pipeline.pool.supervisor import Driver, ahead, train
from pipeline.records.journal import Journal
from pipeline.records.store import TrialStore
from pipeline.records.trial import TrialEnd
from pipeline.sweep.checks import check_all, check_open
from pipeline.sweep.mlflow_sync import MlflowSync
from pipeline.sweep.trial_runs import experiment_note
from pipeline.sweep.view import View
from pipeline.tracking.client import Tracker
from pipeline.tracking.records import KILLED


def sweep(params: Params, studies: list[str], root: Path | None = None) -> None:
    """Train every trial of `studies` that the store does not have, and log all of them to MLflow.

    Safe to kill and to run again: finished trials are never trained twice, an open one goes on at its last epoch.

    Raises:
        InputError: params, data, weights, cluster or tracking store are not in order; nothing was started.
        WorkError: some trials failed; the others are done.
    """
    where = places(root)
    plan = make_plan(params, all_cells(params, studies, where), where)
    for line in unheard(params, plan.cells.values()):
        say(f"note: {line}")
    store = TrialStore(where.runs)
    with in_order(), store.lock("a sweep", wait=copies.is_copy(where.runs.parent)):
        check_open(plan, store)
        check_all(plan, store)
        with ahead(bool(plan.open_keys(store.finished) or plan.searched)) as driver:
            tracker = Tracker(params.tracking.uri, root or Path.cwd(), params.tracking.artifacts)
            tracker.prepare(studies, {study: experiment_note(params, study, plan.cells.values()) for study in studies})
            if tracker.provenance.note:
                say(f"note: the runs have no commit: {tracker.provenance.note}")
            tracker.end_leftovers()
            sync = MlflowSync(tracker, store, plan, studies)
            try:
                failed = _sweep(plan, store, sync, driver)
                sync.settle(params.tracking.patience_seconds)
            finally:
                tracker.close_all(KILLED)  # of trials whose end could not be written
    if failed:
        key, why = next(iter(failed.items()))
        raise WorkError(
            f"{len(failed)} of {len(plan.trials)} trials failed; the first, {key}: {why}",
            where="train",
            way_out="Finished trials are kept; mend the cause and run the same command again",
        )


def _sweep(plan: Plan, store: TrialStore, sync: MlflowSync, driver: Driver | None) -> dict[str, str]:
    params, points = plan.params, len(plan.searched) * plan.params.sweep.num_samples
    known = [key for key, config in plan.trials.items() if config.trained]
    untrained = plan.trials.keys() - set(known)
    todo = plan.open_keys(store.finished)
    counted = f"{len(known)} trials in {len(plan.cells)} cells of {len(sync.studies)} studies"
    say(f"{counted}; {len(known) - len(todo)} are done")
    sync.open_sweeps()
    for key in [*todo, *(key for key in plan.trials if key in untrained and store.done(key) is None)]:
        store.open(plan.trials[key], sync.tracker.provenance)
        if key in untrained:
            store.finish(key, TrialEnd(status="finished", epochs=0, trainable_parameters=0))
    sync.record_done(plan.trials.keys() - set(todo))
    errors: dict[str, str] = {}
    if todo or points:
        started = time.monotonic()
        with View(plan, todo, points) as view:
            errors = train(plan, todo, params, [sync, view], driver, adaptive=bool(points))
        Journal(store.root).note("sweep ended", trials=len(todo), seconds=time.monotonic() - started)
    failed = {}
    for key in known:
        done = store.done(key)
        if done is None or done.status == "failed":
            failed[key] = (done.error if done else None) or errors.get(key, "it did not end")
    sync.close_sweeps(failed=bool(failed))
    return failed
