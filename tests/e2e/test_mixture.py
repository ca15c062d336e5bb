"""One adapter for two tasks, one of them over a file of the user's own: drawn, trained, scored, traced, made again."""

from __future__ import annotations

import json

import pytest

from pipeline.data.manifest import Manifest
from tests.e2e.conftest import make_project

pytestmark = [pytest.mark.e2e, pytest.mark.long, pytest.mark.timeout(900)]
MIXTURE = "vqav2+own"


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixture") / "project"
    made = make_project(folder, slots=1)
    pictures = [f"images/train2014/COCO_train2014_{number:012d}.jpg" for number in range(1, 25)]
    rows = [
        {"id": number, "image": picture, "question": "Is it a picture?", "answer": "yes" if number % 2 else "no"}
        for number, picture in enumerate(pictures)
    ]
    own = folder.parent / f"{folder.name}-data" / "own.jsonl"
    own.write_text("\n".join(map(json.dumps, rows)))

    def edit(raw):
        raw["profiles"]["tiny"]["tasks"] = {"vqav2": None, "own": {"file": "own.jsonl", "split": "drawn"}}
        raw["profiles"]["tiny"]["subsample"]["tasks"] = {MIXTURE: {"num_train": 10}}
        raw["studies"]["small"] |= {
            "tasks": ["vqav2", "own"],
            "methods": {"zero-shot": None, "both": {"method": "mimic", "source_task": MIXTURE}},
        }

    made.change(edit)
    for stage in ("subsample", "train", "evaluate", "report"):
        made.python("-m", f"stages.{stage}")
    return made


def cells(project) -> dict[str, dict]:
    study = json.loads((project.folder / "evaluations/studies/small.json").read_text())
    return {cell["task"]: cell for cell in study["cells"] if cell["row"] == "both"}


def test_one_trial_has_a_score_on_each_task(project):
    manifest = Manifest.load(project.folder / f"data/manifests/{MIXTURE}/manifest.json")
    assert [sample.task for sample in manifest.splits["train"]] == ["vqav2", "own"] * 5
    both = cells(project)
    assert {name: (cell["status"], cell["num_samples"]) for name, cell in both.items()} == {
        "vqav2": ("done", 4), "own": ("done", 4),
    }  # fmt: skip
    assert both["vqav2"]["trial"] == both["own"]["trial"] and both["vqav2"]["run_id"] == both["own"]["run_id"]
    config = json.loads((project.folder / "runs" / both["own"]["trial"] / "config.json").read_text())["config"]
    assert (config["task"], config["num_train_samples"]) == (MIXTURE, 8)


def test_it_is_traced_and_trained_again_to_the_bit(project):
    for task in ("vqav2", "own"):
        done = project.python("-m", "pipeline", "trace", "--study", "small", "--cell", f"both:{task}")
        assert json.loads(done.stdout)["intact"]
    run_id = cells(project)["own"]["run_id"]
    again = json.loads(project.python("-m", "pipeline", "reproduce", run_id, "--here").stdout)
    assert again["tolerance"] == again["largest_difference"] == 0 and again["adapter"]["same"]


def test_it_is_asked_in_the_prompt_of_either(project):
    adapter = f"runs/{cells(project)['own']['trial']}/adapter"
    picture = "data/real/images/train2014/COCO_train2014_000000000001.jpg"
    for task in ((), ("--task", "vqav2"), ("--task", "own")):
        asked = ("--adapter", adapter, "--image", picture, "--question", "Is it a picture?", *task)
        assert "answer" in json.loads(project.python("-m", "pipeline", "predict", *asked).stdout)


def test_a_trial_is_made_from_it_by_hand(project):
    trial = cells(project)["own"]["trial"]
    done = project.python("-m", "pipeline", "clone", trial, "--set", "seed=7")
    project.python("-m", "pipeline", "study", "by-hand")
    (act,) = json.loads(done.stdout)
    end = json.loads((project.folder / "runs" / act["trial"] / "done.json").read_text())
    assert end["status"] == "finished"
