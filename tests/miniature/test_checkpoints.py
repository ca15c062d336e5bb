"""The committed checkpoints: small, loadable, and able to take words from demonstrations."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText

from pipeline.miniature.decoder import draw_probe, emergence
from pipeline.miniature.model import miniature
from pipeline.miniature.vision import Pool, cache_visual_tokens

CHECKPOINTS = Path(__file__).parents[2] / "checkpoints"
SEES, FOLLOWS = 0.97, 0.95  # right values, right words that a demonstration has shown
FOLDERS = sorted(path.name for path in CHECKPOINTS.iterdir() if (path / "config.json").is_file())


def test_all_together_stay_small() -> None:
    assert FOLDERS
    assert sum(path.stat().st_size for path in CHECKPOINTS.rglob("*") if path.is_file()) < 10 * 2**20


@pytest.mark.parametrize("name", FOLDERS)
def test_it_learns_in_context(name: str) -> None:
    spec = miniature(name)
    model = AutoModelForImageTextToText.from_pretrained(CHECKPOINTS / name, dtype=torch.float32)
    rng = np.random.default_rng(123)
    pool = Pool.draw(200, rng)  # images that pre-training has not had
    probe = draw_probe(spec, pool.attributes.numpy(), rng, num_documents=24)
    measured = emergence(model, probe, cache_visual_tokens(spec, model, pool.images))
    assert measured["right_value"] > SEES
    assert measured["seen"] > FOLLOWS  # the demonstrations told the word
    assert measured["unseen"] < 0.6  # nothing else could have


@pytest.mark.parametrize("name", FOLDERS)
def test_its_record_is_there(name: str) -> None:
    record = json.loads((CHECKPOINTS / name / "pretraining.json").read_text())
    assert record["backbone"] == name
    assert record["decoder"][-1]["step"] == record["budget"]["decoder"]["steps"]
