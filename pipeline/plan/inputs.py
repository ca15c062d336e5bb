"""What trials start from: weights and manifests read from their places, or what params.yaml alone tells of them."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from pipeline import backbones
from pipeline.config.load import Params
from pipeline.config.trial import TrialConfig
from pipeline.core.errors import InputError
from pipeline.data.manifest import Manifest
from pipeline.plan.space import Cell, Digests, cells, needed, points
from pipeline.tasks import tasks

WHOLE_SPLIT = 10_000  # stands for a split that is evaluated whole, whose size only its files tell
_AS_GIVEN = "not read: a forecast needs no weights and no data"


@dataclass(frozen=True)
class Places:
    """Where things lie on this machine; every path absolute."""

    runs: Path
    manifests: Path
    cache: Path | None

    def manifest(self, task: str) -> Path:
        """Return the path of a task's manifest."""
        return self.manifests / task / "manifest.json"


def places(root: Path | None = None) -> Places:
    """Return where the project below `root` (default: the current folder) keeps things."""
    root = (root or Path.cwd()).resolve()
    return Places(runs=root / "runs", manifests=root / "data/manifests", cache=root / "cache/visual")


class Inputs:
    """What trials start from: weights and manifests, each read once for all studies that ask for it."""

    def __init__(self, params: Params, where: Places) -> None:
        self.params, self.where = params, where
        self._backbone, self._manifest = functools.cache(self._read_backbone), functools.cache(self._read_manifest)

    def digests(self, studies: Iterable[str]) -> Digests:
        """Return the digests of the backbones and manifests that studies need.

        Raises:
            InputError: weights or a manifest are missing.
        """
        names, tasks = needed(self.params, studies)
        manifests = {task: self._manifest(task) for task in tasks}
        return Digests(
            backbones={name: self._backbone(name) for name in names},
            manifests={task: digest for task, (digest, _) in manifests.items()},
            train_sizes={task: sizes["train"] for task, (_, sizes) in manifests.items()},
            selection_sizes={task: sizes["selection"] for task, (_, sizes) in manifests.items()},
        )

    def _read_backbone(self, name: str) -> str:
        return backbones.digest_of(name, self.params.backbone_source(name))

    def _read_manifest(self, task: str) -> tuple[str, Mapping[str, int]]:
        """Return its digest, and how many samples each split has."""
        path = self.where.manifest(task)
        if not path.exists():
            raise InputError("no manifest", where=str(path), way_out=f"Run `python -m stages.subsample {task}` first")
        manifest = Manifest.load(path)
        return manifest.digest, manifest.sizes


def all_cells(params: Params, studies: list[str], where: Places) -> list[Cell]:
    """Return the cells of several studies, in their order."""
    known = Inputs(params, where).digests(studies)
    return [cell for study in studies for cell in cells(params, study, known)]


def evaluated_samples(params: Params, task: str) -> int:
    """Return how many samples of a task are scored, as far as params.yaml and the official split's size tell."""
    whole = tasks.get(task).official_evaluation or WHOLE_SPLIT
    drawn = params.subsample.of(task).num_evaluation
    return min(params.evaluate.num_evaluation_samples or whole, whole if drawn == "whole" else drawn)


def drawn_samples(params: Params, task: str) -> int:
    """Return how many samples are drawn to train and to choose by."""
    sizes = params.subsample.of(task)
    return sizes.num_train + sizes.num_selection


def as_given(params: Params) -> Digests:
    """Return what stands for digests where nothing is read: the sizes that params.yaml asks for."""
    return Digests(
        backbones=dict.fromkeys(params.run.backbones, _AS_GIVEN),
        manifests=dict.fromkeys(params.run.tasks, _AS_GIVEN),
        train_sizes={task: params.subsample.of(task).num_train for task in params.run.tasks},
        selection_sizes={task: params.subsample.of(task).num_selection for task in params.run.tasks},
    )


def planned_trials(params: Params, study: str) -> list[TrialConfig]:
    """Return the trials of a study, each once, with nothing read from disk."""
    digests = as_given(params)
    planned = (cell.trial(point) for cell in cells(params, study, digests) for point in points(cell, params))
    return list({trial.key: trial for trial in planned}.values())
