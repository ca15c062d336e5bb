"""Settings of methods without training: tiny backbones of every family on made-up files in VQAv2's official shape."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from PIL import Image

from benchmarks.support.synthetic import SyntheticSize, write_vqav2
from pipeline import backbones, methods
from pipeline.config.load import BackboneSource
from pipeline.config.trial import TrialConfig
from pipeline.evaluate.score import fitted
from pipeline.resident.resident import Resident
from pipeline.sweep.draw import draw_manifest
from pipeline.tasks import tasks

SOURCE = BackboneSource(variant="tiny")


@pytest.fixture(scope="session")
def manifest(tmp_path_factory):
    """8 training, 3 selection and 5 evaluation samples; two training samples share an image."""
    root, random = tmp_path_factory.mktemp("vqav2"), np.random.default_rng(0)
    for subset, first, questions, images in (("train2014", 1, 24, 16), ("val2014", 1001, 6, 6)):
        write_vqav2(root, subset, SyntheticSize(num_questions=questions, num_images=images), first_image=first)
        (root / "images" / subset).mkdir(parents=True)
        for i in range(images):
            pixels = random.integers(0, 256, (3, 4, 3), dtype=np.uint8).repeat(16, 0).repeat(16, 1)
            Image.fromarray(pixels).save(root / "images" / subset / f"COCO_{subset}_{first + i:012d}.jpg")
    return draw_manifest(tasks.get("vqav2"), root, seed=0, num_train=8, num_selection=3, num_evaluation=5)


@pytest.fixture(scope="session")
def config(manifest):
    """A trial's configuration: `config(backbone, method, **options)`."""

    def make(backbone: str, method: str, seed: int = 0, **options) -> TrialConfig:
        checked = methods.parse(method, options)
        return TrialConfig(
            backbone=backbone, backbone_digest=backbones.digest_of(backbone, SOURCE), task="vqav2",
            manifest_digest=manifest.digest, method=method, options=checked.plain(), num_train_samples=8, seed=seed,
            num_selection_samples=3 if checked.selects() else 0,
        )  # fmt: skip

    return make


@pytest.fixture(scope="session")
def resident(config):
    """The resident backbone of a name, built once."""
    return cache(lambda name: Resident(config(name, "zero-shot"), SOURCE, None, "cpu"))


@pytest.fixture
def fit(config, resident, manifest):
    """A fitted method: `fit(backbone, method, seed=0, **options)`."""

    def make(backbone: str, method: str, seed: int = 0, **options):
        return fitted(config(backbone, method, seed, **options), resident(backbone), manifest)

    return make
