"""Whether the engine that a trial is trained with is on this machine, asked before anything is trained."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from pathlib import Path

from pipeline import backbones
from pipeline.config.trial import TrialConfig
from pipeline.core.errors import InputError
from pipeline.data import image_files
from pipeline.data.manifest import Manifest
from pipeline.plan.plan import Plan
from pipeline.records.store import TrialStore


def check_engines(trials: Iterable[TrialConfig]) -> str:
    """Return which engines train the trials.

    Raises:
        InputError: DeepSpeed is asked for and not there; it is installed on Linux alone.
    """
    asked = [trial.engine for trial in trials if trial.trained]
    if "deepspeed" in asked and importlib.util.find_spec("deepspeed") is None:
        raise InputError(
            f"{asked.count('deepspeed')} trials ask for ZeRO, offload or the engine deepspeed, and DeepSpeed, "
            "which is for Linux, is not installed",
            where="train",
            way_out="Set train.zero_stage to 0, train.offload to none and train.engine to auto; or make setup on Linux",
        )
    return ", ".join(f"{asked.count(name)} trained by {name}" for name in sorted(set(asked)))


def check_open(plan: Plan, store: TrialStore) -> None:
    """Check the engine of every trial that is not done.

    Raises:
        InputError: see `check_engines`.
    """
    check_engines([*(plan.trials[key] for key in plan.open_keys(store.finished)), *plan.examples])


_NAMED = 5  # pictures of one message


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


def check_all(plan: Plan, store: TrialStore) -> None:
    """Check the pictures of every trial that is not done, for the backbones that have rules.

    Raises:
        InputError: see `check_pictures`.
    """
    pairs = {(config.backbone, config.task) for key, config in plan.trials.items() if not store.finished(key)}
    for backbone, task in sorted(pairs | {(cell.backbone, cell.task) for cell in plan.searched}):
        if has_rules(backbone):
            check_pictures(plan.places.manifest(task), backbone)
