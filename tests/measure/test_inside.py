"""What is measured inside a model, against adapters that are written by hand."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean

import pytest
import torch

from pipeline import adapters
from pipeline.config.trial import EvaluationConfig
from pipeline.measure import Measured, create_measure
from pipeline.measure.inside import LatentDistance
from pipeline.sweep.evaluate import _key
from pipeline.train.workbench import Workbench
from tests.measure.conftest import measured


def written(bench: Workbench, request, part: str) -> None:
    """Write an adapter of which only the parameters of one part of the model do anything."""
    model = bench.resident(request).loaded.model
    adapter = adapters.create(request.config.method, model, **request.config.options)
    with torch.no_grad():
        for name, parameter in adapter.named_parameters():
            parameter.normal_(std=0.2) if part in name else parameter.zero_()
    adapter.save_pretrained(Path(request.folder) / "adapter")


def test_an_adapted_vision_tower_sees_the_pictures_themselves(bench, trial, tmp_path):
    lora, without = trial("lora", tmp_path, rank=2), trial("zero-shot", tmp_path)
    written(bench, lora, "vision")
    adapted, base = measured(bench, "latent_distance", [lora, without], num_shots=1, num_samples=4)
    assert adapted.numbers["latent_distance"] != pytest.approx(base.numbers["latent_distance"], rel=1e-3)
    assert base.layers is not None and len(base.layers.by_layer["latent_distance"]) > 1
    assert fmean(base.layers.by_layer["latent_distance"]) == pytest.approx(base.numbers["latent_distance"], rel=1e-6)


def test_what_a_virtual_token_is_worth(bench, trial, tmp_path):
    requests = []
    for worth in ((0.0, 3.0), (0.0,), (3.0,)):  # both, and each alone
        request = trial(
            "hificl", tmp_path, seed=len(requests), num_virtual_tokens=len(worth), lowrank_k=False, lowrank_v=False
        )
        adapter = adapters.create("hificl", bench.resident(request).loaded.model, **request.config.options)
        with torch.no_grad():
            adapter.k.zero_()
            adapter.v.copy_(torch.tensor(worth)[:, None].expand_as(adapter.v))
        adapter.save_pretrained(Path(request.folder) / "adapter")
        requests.append(request)
    results = measured(bench, "virtual_tokens", requests, num_samples=6)
    both, *alone = (result.numbers for result in results)
    assert both["loss_without_one"] == pytest.approx(max(each["loss"] for each in alone), rel=1e-6)
    assert all(each["loss_without_all"] == pytest.approx(both["loss_without_all"], rel=1e-6) for each in alone)
    shares = [value for name, value in both.items() if name.startswith("virtual_share")]
    assert len(shares) == 4 and all(0 < share < 1 for share in shares)
    kinds = sorted((both["virtual_share_images"], both["virtual_share_text"]))
    assert kinds[0] < both["virtual_share"] < kinds[1]
    assert alone[0]["virtual_share"] < both["virtual_share"]
    layers = results[0].layers
    assert layers is not None and layers.by_token.keys() == {name for name in both if name.startswith("virtual_share")}
    for name, of_tokens in layers.by_token.items():  # keys of zero: both of a layer get the same
        assert all(pair[0] == pytest.approx(pair[1], rel=1e-5) for pair in of_tokens)
        assert [sum(pair) for pair in of_tokens] == pytest.approx(layers.by_layer[name])
        assert fmean(layers.by_layer[name]) == pytest.approx(both[name])
    assert max(layers.by_layer["loss_without_layer"]) == both["loss_without_layer"]
    lora = trial("lora", tmp_path, rank=2)
    written(bench, lora, "vision")
    assert measured(bench, "virtual_tokens", [trial("zero-shot", tmp_path), lora], num_samples=6) == [
        Measured({}),
        Measured({}),
    ]


def test_what_was_measured_by_an_earlier_revision_is_measured_again(monkeypatch):
    evaluation = EvaluationConfig(trial="0" * 16, max_new_tokens=8)
    kind = create_measure("latent_distance", {}, "a study")
    keys = []
    for revision in (1, 2, 3):
        monkeypatch.setattr(LatentDistance, "revision", revision)
        keys.append(_key("latent_distance", kind, evaluation, []))
    assert len(set(keys)) == 3
