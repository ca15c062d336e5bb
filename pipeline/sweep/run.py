"""A sweep from params to a full trial store: what the DVC stage `train` and `hificl sweep` run."""

from __future__ import annotations

import time
from pathlib import Path

from pipeline import copies
from pipeline.config import Params
from pipeline.errors import WorkError
from pipeline.plan.inputs import all_cells, places
from pipeline.plan.plan import Plan, make_plan
from pipeline.plan.unheard import unheard
from pipeline.progress import say
from pipeline.records.trial import Provenance, TrialEnd
from pipeline.sweep.engines import check_open
from pipeline.sweep.journal import Journal
from pipeline.sweep.logbook import Logbook
from pipeline.sweep.naming import experiment_note, sweep_note
from pipeline.sweep.pictures import check_all
from pipeline.sweep.signals import in_order
from pipeline.sweep.store import TrialStore
from pipeline.sweep.supervisor import Driver, ahead, train
from pipeline.sweep.view import View
from pipeline.tracking.runs import FAILED, FINISHED, KILLED, Tracker
from pipeline.tracking.spool import SpooledTracker
from pipeline.trial import canonical, digest

SPOOL = ".spool"  # below runs/


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
            direct = Tracker(params.tracking.uri, root or Path.cwd(), params.tracking.artifacts)
            direct.prepare(studies, {study: experiment_note(params, study, plan.cells.values()) for study in studies})
            if direct.provenance["note"]:
                say(f"note: the runs have no commit: {direct.provenance['note']}")
            tracker = SpooledTracker(direct, where.runs / SPOOL)
            tracker.deliver()  # what an earlier sweep could not
            direct.sweep_leftovers()
            try:
                failed = _sweep(params, studies, plan, store, tracker, driver)
                tracker.settle(params.tracking.patience_seconds)
                tracker.close_all(KILLED)  # of trials whose end could not be written
            except BaseException:
                tracker.close_all(KILLED)
                raise
    if failed:
        key, why = next(iter(failed.items()))
        raise WorkError(
            f"{len(failed)} of {len(plan.trials)} trials failed; the first, {key}: {why}",
            where="train",
            way_out="Finished trials are kept; mend the cause and run the same command again",
        )


def _sweep(
    params: Params, studies: list[str], plan: Plan, store: TrialStore, spooled: SpooledTracker, driver: Driver | None
) -> dict[str, str]:
    tracker, points = spooled.tracker, len(plan.searched) * params.sweep.num_samples
    known = {key: config for key, config in plan.trials.items() if config.trained}
    todo = plan.open_keys(store.finished)
    say(f"{len(known)} trials in {len(plan.cells)} cells of {len(studies)} studies; {len(known) - len(todo)} are done")
    parents = {study: _open_parent(tracker, params, study, plan) for study in studies}
    logbook = Logbook(spooled, store, plan, parents)
    for key in todo:
        store.open(plan.trials[key], Provenance.model_validate(tracker.provenance))
    logbook.record_done(known.keys() - set(todo))
    errors: dict[str, str] = {}
    if todo or points:
        started = time.monotonic()
        with View(plan, todo, points) as view:
            errors = train(plan, todo, params, [logbook, view], driver, adaptive=bool(points))
        seconds = {"seconds": time.monotonic() - started, "spool_seconds": spooled.seconds}
        Journal(store.root).note("sweep ended", trials=len(todo), **seconds)
    for key, config in plan.trials.items():
        if not config.trained:
            _record_untrained(store, plan, key, tracker)
            logbook.record(key)
    failed = {}
    for key in known:
        done = store.done(key)
        if done is None or done.status == "failed":
            failed[key] = (done.error if done else None) or errors.get(key, "it did not end")
    for parent in parents.values():
        spooled.close(parent, FAILED if failed else FINISHED)
    return failed


def _open_parent(tracker: Tracker, params: Params, study: str, plan: Plan) -> str:
    mine = sorted(key for key, cell in plan.cell_of.items() if plan.cells[cell].study == study)
    return tracker.open_sweep(
        study,
        tags={"sweep_key": digest(canonical(mine))[:16], "profile": params.profile},
        description=sweep_note(params, study, len(mine)),
        system_metrics=params.tracking.system_metrics,
    )


def _record_untrained(store: TrialStore, plan: Plan, key: str, tracker: Tracker) -> None:
    if store.done(key) is None:
        store.open(plan.trials[key], Provenance.model_validate(tracker.provenance))
        store.finish(key, TrialEnd(status="finished", epochs=0, trainable_parameters=0))
