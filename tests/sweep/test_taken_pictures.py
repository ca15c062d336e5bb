"""A picture that a backbone does not take is named before anything trains: by the sweep, the doctor and predict."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from pipeline import tasks
from pipeline.commands.doctor import examine
from pipeline.commands.predict import ask
from pipeline.config.load import load
from pipeline.core.errors import InputError
from pipeline.pool.supervisor import Drivers
from pipeline.sweep.draw import draw_manifest
from pipeline.sweep.train import check_pictures, places, sweep
from tests.e2e.conftest import change, make_project

RULE = "Qwen3-VL reads no picture more than 200 times as wide as high, or as high as wide"


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """A project with a thin picture among those that are drawn, and two backbones of which one takes it."""
    made = make_project(tmp_path_factory.mktemp("thin") / "project").folder

    def both(raw):
        names = ["idefics2-8b-base", "qwen3-vl-8b"]
        raw["profiles"]["tiny"]["backbones"] = raw["studies"]["small"]["backbones"] = names
        raw["profiles"]["tiny"]["sources"] = dict.fromkeys(names, {"variant": "tiny"})

    change(made, both)
    for picture in sorted((made / "data/real/images/train2014").iterdir()):
        Image.open(picture).resize((300, 1)).save(picture)  # each thin, but no two alike
    manifest = draw_manifest(
        tasks.get("vqav2"), made / "data/real", seed=0, num_train=8, num_selection=2, num_evaluation=4
    )
    manifest.save(places(made).manifest("vqav2"))
    return made


def test_the_sweep_ends_before_it_begins(project, monkeypatch):
    monkeypatch.chdir(project)
    with pytest.raises(InputError) as caught:
        sweep(load(), ["small"], Drivers())
    text = str(caught.value)
    assert "vqav2: qwen3-vl-8b does not take" in text and f".jpg: 300 x 1 pixels: {RULE}" in text and "\n" not in text
    assert "Take them out of the data" in text
    assert not list((project / "runs").glob("*/config.json")) and not (project / "mlflow.db").exists()


def test_only_the_backbone_that_has_a_rule_asks(project, monkeypatch):
    monkeypatch.chdir(project)
    path = places(project).manifest("vqav2")
    assert check_pictures(path, "idefics2-8b-base") > 8
    checks = {check["name"]: check for check in examine(load(), project).record()["checks"]}
    found = checks["pictures of vqav2 for qwen3-vl-8b"]
    assert found["state"] == "missing" and RULE in found["detail"] and found["way_out"]
    assert "pictures of vqav2 for idefics2-8b-base" not in checks


def test_predict_says_so_before_it_loads_weights(project, tmp_path):
    facts = {"model_type": "qwen3_vl", "num_layers": 4, "num_heads": 4, "head_dim": 16, "hidden_size": 64}
    config = {
        "method": "hificl", "options": {}, "backbone": facts, "extra": {"backbone": "qwen3-vl-8b", "task": "vqav2"},
    }  # fmt: skip
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    thin = sorted((project / "data/real/images/train2014").iterdir())[0]
    with pytest.raises(InputError, match=rf"{thin.name}: 300 x 1 pixels: {RULE}"):
        ask(tmp_path, thin, question="What?")
