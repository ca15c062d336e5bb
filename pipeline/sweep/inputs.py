"""Which samples of a manifest a trial uses, and for what: the dataset inputs of its run in MLflow."""

from __future__ import annotations

import os

from pipeline import methods
from pipeline.plan.inputs import Places
from pipeline.tracking.inputs import Input
from pipeline.trial import TrialConfig


def used_by(config: TrialConfig, places: Places) -> list[Input]:
    """Return the samples that a trial learns from, or shows, and those that it chooses by."""
    found = []
    if config.trained or methods.options(config).shots:
        seed = f" {config.seed}" if config.sample_draw == "by-seed" else ""
        drawn = f"{config.num_train_samples} of train, {config.sample_draw}{seed}"
        context = "training" if config.trained else "demonstrations"
        found.append(_input(config, places, "train", context, drawn, config.num_train_samples))
    if methods.options(config).selects():
        if config.selection == "test":
            found.append(_input(config, places, "evaluation", "selection", "all of evaluation", None))
        else:
            drawn = f"{config.num_selection_samples} of selection, first"
            found.append(_input(config, places, "selection", "selection", drawn, config.num_selection_samples))
    return found


def scored_by(config: TrialConfig, places: Places, split: str, number: int) -> Input:
    """Return the samples that a trial was scored on."""
    return _input(config, places, split, "evaluation", f"{number} of {split}, first", number)


def _input(
    config: TrialConfig, places: Places, split: str, context: str, samples: str, rows: int | None
) -> Input:  # fmt: skip
    manifest = os.path.relpath(places.manifest(config.task), places.runs.parent)
    return Input(
        name=f"{config.task}/{split}", source=manifest, digest=config.manifest_digest, context=context, samples=samples,
        rows=rows,
    )  # fmt: skip
