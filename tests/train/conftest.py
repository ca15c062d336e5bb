"""A small world of the miniature's, its resident backbone, and trials on it."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline import methods
from pipeline.config.load import BackboneSource
from pipeline.config.request import TrialRequest
from pipeline.config.trial import TrialConfig
from pipeline.miniature.world import write_world
from pipeline.sweep.draw import draw_manifest
from pipeline.tasks import tasks
from tests.conftest import ROOT

BACKBONE = "mini-idefics2"


@pytest.fixture(scope="session")
def small_world(tmp_path_factory) -> Path:
    """Manifests of mini-vqa and mini-coco with 24 training samples."""
    folder = tmp_path_factory.mktemp("small-world")
    write_world(folder / "data", num_train_images=60, num_val_images=12)
    for task in ("mini-vqa", "mini-coco"):
        manifest = draw_manifest(
            tasks.get(task), folder / "data", seed=0, num_train=24, num_selection=6, num_evaluation=4
        )
        manifest.save(folder / task / "manifest.json")
    return folder


@pytest.fixture(scope="session")
def trial(small_world):
    """`trial(method, folder, **fields)` gives the request of a short trial; options and fields of TrialConfig mixed."""
    from pipeline import backbones
    from pipeline.data.manifest import Manifest

    weights = str(ROOT / "checkpoints" / BACKBONE)
    digest = backbones.digest_of(BACKBONE, BackboneSource(weights=weights))
    manifests = {task: Manifest.load(small_world / task / "manifest.json").digest for task in ("mini-vqa", "mini-coco")}

    def make(method: str, folder: Path, task: str = "mini-vqa", **given) -> TrialRequest:
        options = {name: given.pop(name) for name in list(given) if name in methods.option_names(method)}
        checked = methods.parse(method, options)
        facts = checked.facts()
        base = {
            "num_train_samples": 20, "epochs": 2, "learning_rate": facts.learning_rate, "weight_decay": 0.05,
            "warmup_ratio": 0.1, "gradient_clip": 1.0, "micro_batch_size": 2, "accumulation": 2, "engine": "torch",
            "num_selection_samples": 4, "num_shots": 2 if facts.teacher else 0, "alignment_weight":
            facts.alignment_weight, "ground_truth_weight": facts.ground_truth_weight,
        }  # fmt: skip
        config = TrialConfig(
            backbone=BACKBONE, backbone_digest=digest, task=task, manifest_digest=manifests[task], method=method,
            options=checked.plain(), **{**base, **given},
        )  # fmt: skip
        return TrialRequest(
            config=config, folder=str(folder / config.key), manifest=str(small_world / task / "manifest.json"),
            source=BackboneSource(weights=weights),
        )  # fmt: skip

    return make
