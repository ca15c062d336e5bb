"""A sweep from params to a full trial store: what the DVC stage `train` and `hificl sweep` run.

Before anything is trained, the engines that trials ask for are looked for, and the pictures are held to what the
backbones take.
"""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from pipeline import backbones
from pipeline.backbones.weights import check_quantization
from pipeline.config.load import Params, with_study
from pipeline.config.trial import TrialConfig
from pipeline.core import copies
from pipeline.core.errors import InputError, WorkError
from pipeline.core.progress import say
from pipeline.data import image_files
from pipeline.data.manifest import Manifest
from pipeline.plan.plan import Plan, all_cells, make_plan, places
from pipeline.plan.unheard import unheard
from pipeline.pool.processes import in_order
from pipeline.pool.supervisor import Drivers, train
from pipeline.records.journal import Journal
from pipeline.records.store import Displaced, TrialStore
from pipeline.records.trial import TrialEnd
from pipeline.sweep.mlflow_sync import MlflowSync, experiment_note
from pipeline.sweep.view import View
from pipeline.tracking.client import Tracker
from pipeline.tracking.records import KILLED
from pipeline.train import checkpoint

BY_HAND = "by-hand"  # the study of the trials that were made from others by hand (`sweep.recorded`)
_NAMED = 5  # pictures of one message


def sweep(params: Params, studies: list[str], drivers: Drivers, root: Path | None = None) -> None:
    """Train every trial of `studies` that the store does not have, and log all of them to MLflow.

    Safe to kill and to run again: finished trials are never trained twice, an open one goes on at its last epoch.

    Args:
        params: the sweep's.
        studies: by name.
        drivers: the command's.
        root: the project's folder; None: the current one.

    Raises:
        InputError: params, data, weights, cluster or tracking store are not in order; nothing was started.
        WorkError: some trials failed; the others are done.
    """
    folders = places(root)
    store = TrialStore(folders.runs)
    cells = all_cells(params, studies, folders)
    known: set[str] | None = None
    while True:
        plan = make_plan(params, cells, folders, store.objective)
        if known is not None and plan.trials.keys() <= known:
            return
        acts = len(store.acts())
        _swept(params, studies, root, plan, drivers)
        meanwhile = store.acts()[acts:]  # done by hand while this one trained
        if any(act.parent for act in meanwhile):
            params, studies = with_study(params, BY_HAND, folders.runs.parent), [*dict.fromkeys([*studies, BY_HAND])]
            cells = all_cells(params, studies, folders)
        elif not meanwhile and not any((budget := params.studies[study].budget) and budget.widen for study in studies):
            return
        # what they came out as may ask for more, and what may go on was not trained to its end
        known = plan.trials.keys() - {act.trial for act in meanwhile if act.act == "resume"}


def _swept(params: Params, studies: list[str], root: Path | None, plan: Plan, drivers: Drivers) -> None:
    folders = plan.places
    for line in unheard(params, plan.cells.values()):
        say(f"note: {line}")
    store = TrialStore(folders.runs)
    with in_order(), store.lock("a sweep", wait=copies.is_copy(folders.runs.parent)):
        check_open_engines(plan, store)
        check_open_pictures(plan, store)
        wanted = bool(plan.open_keys(store.settled) or plan.searched)
        if wanted:
            drivers.start(params.sweep)  # while MLflow is opened
        else:
            drivers.end()
        tracker = Tracker(params.tracking.uri, root or Path.cwd(), params.tracking.artifacts)
        tracker.prepare(studies, {study: experiment_note(params, study, plan.cells.values()) for study in studies})
        if tracker.provenance.note:
            say(f"note: the runs have no commit: {tracker.provenance.note}")
        tracker.end_leftovers()
        sync = MlflowSync(tracker, store, plan, studies)
        try:
            failed = _sweep(plan, store, sync, drivers)
            sync.settle(params.tracking.patience_seconds)
        finally:
            if not isinstance(sys.exception(), Displaced):  # else they are another sweep's by now
                tracker.close_all(KILLED)  # of trials whose end could not be written
    if failed:
        key, why = next(iter(failed.items()))
        raise WorkError(
            f"{len(failed)} of {len(plan.trials.keys() | failed)} trials failed; the first, {key}: {why}",
            where="train",
            way_out="Finished trials are kept; mend the cause and run the same command again",
        )


def _sweep(plan: Plan, store: TrialStore, sync: MlflowSync, drivers: Drivers) -> dict[str, str]:
    params, points = plan.params, len(plan.searched) * plan.params.sweep.num_samples
    known = [key for key, config in plan.trials.items() if config.trained]
    untrained = plan.trials.keys() - set(known)
    todo = plan.open_keys(store.settled)
    counted = f"{len(known)} trials in {len(plan.cells)} cells of {len(sync.studies)} studies"
    say(f"{counted}; {len(known) - len(todo)} are done")
    sync.open_sweeps()
    for key in [*todo, *(key for key in plan.trials if key not in todo and store.done(key) is None)]:
        store.open(plan.trials[key], sync.tracker.provenance)
        if key in untrained:
            store.finish(key, TrialEnd(status="finished", epochs=0, trainable_parameters=0))
        elif key not in todo:  # stopped by hand while nothing trained it
            store.finish(key, checkpoint.stopped(store.trial(key).checkpoint))
    sync.record_done(plan.trials.keys() - set(todo), later=bool(todo or points))
    errors: dict[str, str] = {}
    if todo or points:
        started = time.monotonic()
        with View(plan, todo, points) as view:
            errors = train(plan, todo, params, store, [sync, view], drivers, adaptive=bool(points))
        Journal(store.root).note("sweep ended", trials=len(todo), seconds=time.monotonic() - started)
    failed = failures(known, store, errors)
    sync.close_sweeps(failed=bool(failed))
    return failed


def failures(planned: Iterable[str], store: TrialStore, errors: dict[str, str]) -> dict[str, str]:
    """Return why trials failed, by key: the `planned` ones, and points of a search that were left open.

    A point that failed in order is what the search learnt of its values, and no failure of the sweep.
    """
    failed = {}
    for key in planned:
        done = store.done(key)
        if done is None or done.status == "failed":
            failed[key] = (done.error if done else None) or errors.get(key, "it did not end")
    return failed | {key: why for key, why in errors.items() if key not in failed and store.done(key) is None}


def check_engines(trials: Iterable[TrialConfig]) -> str:
    """Return which engines train the trials.

    Raises:
        InputError: DeepSpeed is asked for and not there (it is installed on Linux alone), or what few bits take.
    """
    trials = list(trials)
    for kind in sorted({trial.quantize for trial in trials}):
        check_quantization(kind, "train.quantize")
    asked = [trial.engine for trial in trials if trial.trained]
    if "deepspeed" in asked and importlib.util.find_spec("deepspeed") is None:
        raise InputError(
            f"{asked.count('deepspeed')} trials ask for ZeRO, offload or the engine deepspeed, and DeepSpeed, "
            "which is for Linux, is not installed",
            where="train",
            way_out="Set train.zero_stage to 0, train.offload to none and train.engine to auto; or make setup on Linux",
        )
    return ", ".join(f"{asked.count(name)} trained by {name}" for name in sorted(set(asked)))


def check_open_engines(plan: Plan, store: TrialStore) -> None:
    """Check the engine of every trial that is not done.

    Raises:
        InputError: see `check_engines`.
    """
    check_engines([*(plan.trials[key] for key in plan.open_keys(store.settled)), *plan.examples])


def has_rules(backbone: str) -> bool:
    """Whether there are pictures that the backbone does not take."""
    return bool(backbones.get(backbone).family.size_rules)


def check_pictures(path: Path, backbone: str) -> int:
    """Read the sizes of all pictures of a manifest; return how many there are.

    Raises:
        InputError: some are not what the backbone takes, with file, size and rule; or cannot be read.
    """
    manifest, family = Manifest.load(path), backbones.get(backbone).family
    images = list(dict.fromkeys(i for samples in manifest.splits.values() for sample in samples for i in sample.images))
    bad = []
    for image, size in zip(images, image_files.sizes(images, manifest.image_root), strict=True):
        try:
            family.check_size(*size, where=str(image_files.located(image, manifest.image_root)))
        except InputError as error:
            bad.append(f"{error.where}: {error.what}")
    if bad:
        more = f"; and {len(bad) - _NAMED} more" if len(bad) > _NAMED else ""
        raise InputError(
            f"{backbone} does not take {len(bad)} of {len(images)} pictures: {'; '.join(bad[:_NAMED])}{more}",
            where=manifest.task,
            way_out="Take them out of the data and draw again, or leave the backbone out",
        )
    return len(images)


def check_open_pictures(plan: Plan, store: TrialStore) -> None:
    """Check the pictures of every trial that is not done, for the backbones that have rules.

    Raises:
        InputError: see `check_pictures`.
    """
    pairs = {(config.backbone, config.task) for key, config in plan.trials.items() if not store.settled(key)}
    for backbone, task in sorted(pairs | {(cell.backbone, cell.task) for cell in plan.searched}):
        if has_rules(backbone):
            check_pictures(plan.places.manifest(task), backbone)
