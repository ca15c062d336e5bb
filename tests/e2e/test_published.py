"""A whole run under `protocol: published`: its own draw, prompts, training and decoding, named in the report."""

from __future__ import annotations

import json
import shutil

import pytest

from pipeline import adapters
from tests.e2e.conftest import make_project

pytestmark = [pytest.mark.e2e, pytest.mark.long, pytest.mark.timeout(600)]
METHODS = {"zero-shot": None, "icl-2": {"method": "icl-k", "num_shots": 2}, "hificl": {"rank": 1}, "mimic": None}


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    made = make_project(tmp_path_factory.mktemp("published") / "project")
    data = made.folder / "data" / "real"
    (data / "okvqa").mkdir()
    for path in (data / "vqav2").glob("v2_*.json"):  # the official files differ in their names alone
        shutil.copy(path, data / "okvqa" / path.name.removeprefix("v2_"))

    def edit(raw):
        raw["protocol"] = "published"
        raw["profiles"]["tiny"].update(tasks=["okvqa"], evaluate={})
        raw["profiles"]["tiny"]["train"] = {**raw["profiles"]["tiny"]["train"], "epochs_below_1000": 1}
        raw["studies"]["small"].update(tasks=["okvqa"], methods=METHODS)

    made.change(edit)
    made.shown = {}
    for stage in (("subsample", "okvqa"), ("train",), ("evaluate",), ("report",)):
        # in a terminal, where progress is a live view and not lines
        made.shown[" ".join(stage)] = made.in_terminal("-m", f"stages.{stage[0]}", *stage[1:])
    return made


def test_a_terminal_shows_what_is_going_on(project):
    assert "okvqa: reading the train answers" in project.shown["subsample okvqa"]
    assert "Ray starts" in project.shown["train"] and " of 2, " in project.shown["train"]
    assert all("Traceback" not in text for text in project.shown.values())


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def test_the_draw_and_the_trials_have_the_published_choices(project):
    manifest = read(project.folder / "data" / "manifests" / "okvqa" / "manifest.json")
    assert manifest["prompt"] == "published"
    assert all(sample["target"] == sample["references"][0] for sample in manifest["splits"]["train"])
    configs = {row["method"]: row for row in (read(p)["config"] for p in project.folder.glob("runs/*/config.json"))}
    assert {configs[name]["loss_span"] for name in ("hificl", "mimic")} == {"sequence"}
    assert {configs[name]["selection"] for name in ("hificl", "mimic")} == {"test"}
    assert configs["mimic"]["demonstration_draw"] == "with-replacement"
    ends = [read(path)["status"] for path in project.folder.glob("runs/*/done.json")]
    assert ends == ["finished"] * 4


def test_every_method_is_scored_as_its_own_code_does(project):
    scored = {}
    for path in project.folder.glob("evaluations/*.json"):
        record = read(path)
        scored[record["config"]["method"]] = record
    decoding = {
        name: tuple(record["evaluation"][key] for key in ("num_beams", "length_penalty", "max_new_tokens"))
        for name, record in scored.items()
    }
    assert decoding == {"hificl": (1, 1.0, 20), **dict.fromkeys(("mimic", "zero-shot", "icl-k"), (3, 0.0, 10))}
    assert all(record["evaluation"]["stem_predictions"] for record in scored.values())
    assert all(record["num_samples"] == 4 for record in scored.values())
    assert not any("end_of_outterance" in row["prediction"] for r in scored.values() for row in r["predictions"])


def test_the_report_names_the_protocol(project):
    line = "Protocol: published"
    assert line in (project.folder / "reports" / "small.md").read_text(encoding="utf-8")
    assert line in (project.folder / "reports" / "index.html").read_text(encoding="utf-8")
    assert read(project.folder / "evaluations" / "studies" / "small.json")["protocol"] == "published"


def test_an_adapter_is_asked_with_the_prompt_it_was_trained_on(project):
    adapter = next(
        path.parent
        for path in project.folder.glob("runs/*/adapter/adapter_config.json")
        if adapters.read_config(path.parent).extra
    )
    assert adapters.read_config(adapter).extra["prompt"] == "published"
    image = next((project.folder / "data" / "real" / "images" / "val2014").glob("*.jpg"))
    asked = project.python("-m", "pipeline", "predict", "--adapter", str(adapter), "--image", str(image),
                           "--question", "What is it?")  # fmt: skip
    assert "answer" in json.loads(asked.stdout)
