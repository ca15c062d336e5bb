"""The way back from a number and forward again, on the small project whose pipeline has run once."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest

from pipeline.cli import main
from pipeline.config.load import FOLDERS
from pipeline.report import forget
from tests.conftest import ROOT
from tests.e2e.conftest import Project, copied
from tests.e2e.test_pipeline import query

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]


@pytest.fixture
def here(project, monkeypatch):
    monkeypatch.chdir(project.folder)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return project


@pytest.fixture
def copy(project, tmp_path, monkeypatch) -> Project:
    """A copy that a test may spoil; its MLflow artifacts are the project's own."""
    made = copied(project, tmp_path / "copy")
    made.one_slot()
    monkeypatch.chdir(made.folder)
    return made


def hificl(capfd, *arguments: str) -> tuple[int, dict, str]:
    """Exit status, the JSON on standard output, and the last line on standard error."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    out, err = capfd.readouterr()
    lines = err.strip().splitlines()
    return ended.value.code, json.loads(out) if out.strip() else {}, lines[-1] if lines else ""


def rows(project) -> list[dict[str, str]]:
    with open(project.folder / "reports/small.csv", newline="") as file:
        return list(csv.DictReader(file))


def study(project) -> dict:
    return json.loads((project.folder / "evaluations/studies/small.json").read_text())


def test_every_cell_traces_to_an_existing_run_and_intact_digests(here, capfd):
    for number, row in enumerate(rows(here), start=1):
        status, found, _ = hificl(capfd, "trace", f"reports/small.csv:{number}:value")
        assert status == 0 and found["intact"] and found["cell"]["method"] == row["method"]
        (chain,) = found["chain"]
        assert chain["run"]["run_id"] == row["run_ids"] and chain["run"]["status"] == "FINISHED"
        assert chain["data"]["sources"] and chain["data"]["images"] > 0
        trained = chain["config"]["epochs"] > 0
        assert ("adapter" in chain) == trained
        states = {check["state"] for check in found["checks"]}
        assert states <= {"same", "not recorded"}
    by_name = hificl(capfd, "trace", "--study", "small", "--cell", "hificl:vqav2")[1]
    assert by_name["cell"]["method"] == "hificl" and by_name["chain"][0]["code"]["versions"]["torch"]
    assert hificl(capfd, "trace", "reports/small.md:hificl:accuracy")[1]["chain"] == by_name["chain"]
    status, every, _ = hificl(capfd, "trace", "--all")
    assert status == 0 and every["studies"]["small"] == {"numbers": 4, "without_a_number": 0, "seeds": 4}
    assert every["runs"] == 4 and every["checks"] > 20


def spoil(file: Path, before: bytes = b"") -> None:
    """Flip one bit in the middle of a file, or in the byte that follows `before`."""
    content = bytearray(file.read_bytes())
    place = content.index(before) + len(before) if before else len(content) // 2
    content[place] ^= 1
    file.unlink()  # a copy may share its bytes with the original
    file.write_bytes(content)


def test_trace_names_the_file_with_a_flipped_byte(copy, capfd):
    number = [row["method"] for row in rows(copy)].index("hificl") + 1
    cell = f"reports/small.csv:{number}:value"
    chain = hificl(capfd, "trace", cell)[1]["chain"][0]
    real = copy.folder / "data/real"
    data = copy.folder / "own-data"
    shutil.copytree(real.resolve(), data)
    real.unlink()
    real.symlink_to(data)
    spoiled = {
        "adapter": copy.folder / chain["adapter"]["folder"] / "adapter_model.safetensors",
        "trial": copy.folder / "runs" / chain["trial"] / "config.json",
        "source file": data / next(iter(chain["data"]["sources"])),
        "manifest": copy.folder / chain["data"]["manifest"],
    }
    image = json.loads(spoiled["manifest"].read_text())["splits"]["train"][0]["images"][0]["path"]
    spoiled["image"] = data / image
    for what, file in spoiled.items():
        kept = file.read_bytes()
        spoil(file, b'"learning_rate": 0.' if what == "trial" else b"")
        status, found, line = hificl(capfd, "trace", cell)
        file.write_bytes(kept)
        assert status == 1 and not found["intact"], what
        wrong = [check for check in found["checks"] if check["state"] in ("differs", "missing")]
        assert any(check["what"].startswith(what) for check in wrong), (what, wrong)
        assert any(Path(check["where"]).name in {file.name, file.parent.name} for check in wrong), (what, wrong)
        assert "error: " in line and what in line
    assert hificl(capfd, "trace", cell)[0] == 0
    score = copy.folder / chain["evaluation"]
    score.write_text(score.read_text().replace('"score": ', '"score":  ', 1))
    status, found, line = hificl(capfd, "trace", cell)
    assert status == 1 and score.name in line and not found["intact"]


def test_a_number_that_was_edited_in_the_report_is_seen(copy, capfd):
    file = copy.folder / "reports/small.csv"
    content = list(csv.reader(file.open(newline="")))
    content[1][4] = "99"
    with file.open("w", newline="") as out:
        csv.writer(out).writerows(content)
    status, found, line = hificl(capfd, "trace", "reports/small.csv:1:value")
    assert status == 1 and "reports/small.csv" in line and "99" in line
    status, every, line = hificl(capfd, "trace", "--all", "--study", "small")
    assert status == 1 and len(every["wrong"]) == 1 and "99" in line
    assert found["checks"][0]["found"] == "99"


def test_a_trace_of_every_report_says_that_there_is_none(copy, capfd):
    shutil.rmtree(copy.folder / "evaluations/studies")
    status, _, line = hificl(capfd, "trace", "--all")
    assert status == 2 and "no study has been evaluated. Run `dvc repro` first" in line


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["reports/small.csv"], ["FILE:ROW:COLUMN"]),
        (["reports/small.csv:9:value"], ["no row 9", "4"]),
        (["reports/small.csv:hifcl:vqav2"], ["hifcl", "Did you mean 'hificl'"]),
        (["reports/small.csv:hificl:coco"], ["no column 'coco'", "vqav2"]),
        (["reports/small.csv:1:paper"], ["paper", "value"]),
        (["reports/gone.csv:1:value"], ["no such file"]),
        (["--study", "smull", "--cell", "hificl:vqav2"], ["smull", "small"]),
        (["--study", "small"], ["--cell"]),
    ],
)
def test_a_place_that_is_none_is_said_in_one_line(here, capfd, arguments, words):
    status, found, line = hificl(capfd, "trace", *arguments)
    assert status == 2 and not found
    assert all(word in line for word in words), line


def test_a_run_is_reproduced_to_the_bit_from_its_own_record(here, capfd):
    run_id = next(row["run_ids"] for row in rows(here) if row["method"] == "mimic")
    before = sorted(path.name for path in (here.folder / "runs").iterdir())
    status, found, line = hificl(capfd, "reproduce", run_id)
    assert status == 0, line
    assert found["reproduced"] and found["predictions"]["samples"] == 4
    key = next(row["trial"] for row in study(here)["cells"] if row["row"] == "mimic")
    assert json.loads((here.folder / "runs" / key / "done.json").read_text())["exact"]  # alone or in a pack
    assert found["tolerance"] == 0 and found["others"]["train_loss"]["difference"] == 0
    assert found["largest_difference"] == 0 and found["number"]["difference"] == 0
    assert found["adapter"]["same"] and found["predictions"]["differ"] == 0
    assert found["code"]["ran"] == found["code"]["recorded"]
    assert sorted(path.name for path in (here.folder / "runs").iterdir()) == before


@pytest.mark.long  # which `reproduce` does too
def test_a_trial_is_trained_and_scored_from_its_own_json(copy, capfd):
    row = next(cell for cell in study(copy)["cells"] if cell["row"] == "mimic")
    before, score = copy.folder / "runs" / row["trial"], copy.folder / f"evaluations/{row['evaluation']}.json"
    recorded, first = before.rename(copy.folder / "recorded"), score.rename(copy.folder / "score.json")
    copy.change(lambda raw: raw["train"].update(learning_rate=1.0))  # reaches no recorded trial
    status, found, line = hificl(capfd, "run-trial", "recorded/config.json", "--evaluation", "score.json")
    assert status == 0, line
    assert (found["trial"], found["evaluation"]) == (row["trial"], f"evaluations/{row['evaluation']}.json")
    digests = [json.loads((folder / "done.json").read_text())["adapter_digest"] for folder in (before, recorded)]
    assert digests[0] == digests[1] and found["value"] == json.loads(first.read_text())["value"]


def run_of(copy, key: str) -> str:
    return query(copy, f"select run_uuid from tags where key='trial_key' and value='{key}'")[0][0]


@pytest.mark.parametrize("reproduced", [False, pytest.param(True, marks=pytest.mark.long)])
def test_what_is_done_by_hand_is_trained_shown_and_done_again_by_reproduce(copy, capfd, reproduced):
    parent = next(row["trial"] for row in study(copy)["cells"] if row["row"] == "hificl")
    status, (act,), _ = hificl(capfd, "clone", parent[:6], "--grid", "rank=1", "--set", "seed=5", "--set", "epochs=3")
    clone = act["trial"]
    assert status == 0 and act["parent"] == parent and clone != parent
    assert hificl(capfd, "stop", clone[:6], "--after", "2")[0] == 0
    said = copy.python("-m", "pipeline", "study", "by-hand").stderr
    end = json.loads((copy.folder / "runs" / clone / "done.json").read_text())
    assert (end["status"], end["epochs"], end["exact"]) == ("stopped", 2, True)
    assert f"`hificl resume {clone}` lets it go on" in said
    if reproduced:
        status, found, line = hificl(capfd, "reproduce", run_of(copy, clone), "--here")
        assert status == 0 and found["tolerance"] == found["largest_difference"] == 0, line
        assert found["adapter"]["same"] and found["others"]["train_loss"]["difference"] == 0
    assert hificl(capfd, "resume", clone)[0] == 0
    status, (act,), line = hificl(capfd, "extend", parent, "--epochs", "3")
    extended = act["trial"]
    copy.python("-m", "pipeline", "study", "by-hand")
    shown = hificl(capfd, "trace", "--study", "by-hand", "--cell", f"{clone}:vqav2")[1]
    assert shown["intact"] and shown["chain"][0]["by_hand"] == [
        f"a clone of {parent} with rank 1, seed 5, epochs 3", "stopped after epoch 2", "may go on",
    ]  # fmt: skip
    ledger = [(row["act"], row["trial"]) for row in hificl(capfd, "acts")[1]]
    assert ledger == [("clone", clone), ("stop", clone), ("resume", clone), ("extend", extended)]
    if reproduced:
        status, found, line = hificl(capfd, "reproduce", run_of(copy, extended), "--here")
        assert status == 0 and found["tolerance"] == found["largest_difference"] == 0, line
        assert found["predictions"]["differ"] == 0 and found["adapter"]["same"]


def test_what_cannot_be_reproduced_is_said_before_any_work(copy, capfd):
    by_method = {row["method"]: row["run_ids"] for row in rows(copy)}
    trial = hificl(capfd, "trace", "--study", "small", "--cell", "mimic:vqav2")[1]["chain"][0]
    assert hificl(capfd, "reproduce", "beef")[0] == 2
    status, _, line = hificl(capfd, "reproduce", trial["run"]["parent"])
    assert status == 2 and "not a trial" in line
    manifest = copy.folder / trial["data"]["manifest"]
    kept = manifest.read_text()
    image = json.loads(kept)["splits"]["train"][0]["images"][0]["path"].rpartition("/")[2]
    manifest.write_text(kept.replace('"seed": 0', '"seed": 1'))
    status, _, line = hificl(capfd, "reproduce", by_method["mimic"])
    assert status == 2 and "digest" in line
    manifest.write_text(kept.replace(image, f"gone-{image}"))
    assert hificl(capfd, "reproduce", by_method["mimic"])[0] == 2
    manifest.write_text(kept)
    copy.change(lambda raw: raw["profiles"]["tiny"]["sources"]["idefics2-8b-base"].update(seed=7))
    status, _, line = hificl(capfd, "reproduce", by_method["mimic"])
    assert status == 2 and "the weights changed" in line


def test_an_adapter_answers_for_an_image(here, capfd):
    folder = next(path.parent for path in sorted((here.folder / "runs").glob("*/adapter/adapter_config.json")))
    image = next(iter(sorted((here.folder / "data/real/images").rglob("*.jpg"))))
    asked = ["predict", "--adapter", str(folder), "--image", str(image), "--max-new-tokens", "3"]
    status, found, _ = hificl(capfd, *asked, "--question", "What is this?")
    assert status == 0 and isinstance(found["answer"], str) and found["backbone"] == "idefics2-8b-base"
    assert found["task"] == "vqav2" and found["trial"] == folder.parent.name
    assert hificl(capfd, *asked, "--question", "What is this?")[1]["answer"] == found["answer"]
    status, _, line = hificl(capfd, *asked)
    assert status == 2 and "--question" in line
    status, _, line = hificl(capfd, *asked[:4], str(here.folder / "params.yaml"), "--question", "What?")
    assert status == 2 and "params.yaml" in line
    status, _, line = hificl(capfd, "predict", "--adapter", "nowhere", "--image", str(image))
    assert status == 2 and "nowhere" in line


def test_the_doctor_says_what_is_there_and_how_to_get_the_rest(here, capfd, tmp_path, monkeypatch):
    status, found, _ = hificl(capfd, "doctor")
    assert status == 0 and found["ok"] and found["profile"] == "tiny"
    assert {"data of vqav2", "weights of idefics2-8b-base", "java", "gpus", "ray", "mlflow", "disk"} <= {
        check["name"] for check in found["checks"]
    }
    shutil.copy(ROOT / "params.yaml", tmp_path / "params.yaml")
    for kind in FOLDERS:
        shutil.copytree(ROOT / kind, tmp_path / kind)
    monkeypatch.chdir(tmp_path)
    status, found, line = hificl(capfd, "doctor", "--profile", "real")
    missing = {check["name"]: check for check in found["checks"] if check["state"] == "missing"}
    assert status == 1 and "weights of idefics2-8b-base" in missing and "data of coco" in line
    assert all(check["way_out"] for check in missing.values())
    assert not (tmp_path / "mlflow.db").exists()
    status, _, line = hificl(capfd, "doctor", "--profile", "reel")
    assert status == 2 and "Did you mean 'real'" in line


def test_gc_shows_and_removes_what_no_report_refers_to(copy, capfd):
    status, found, _ = hificl(capfd, "gc")
    assert status == 0 and (found["trials"], found["evaluations"], found["mlflow_runs"]) == ([], [], [])
    kept = sorted((copy.folder / "runs").glob("*/config.json"))
    spare = copy.folder / "runs/0123456789abcdef"
    shutil.copytree(kept[0].parent, spare)
    (copy.folder / "evaluations/feedfeedfeedfeed.json").write_text("{}")
    found = hificl(capfd, "gc")[1]
    assert found["trials"] == ["runs/0123456789abcdef"] and found["bytes"] > 0 and not found["removed"]
    assert found["evaluations"] == ["evaluations/feedfeedfeedfeed.json"] and spare.exists()
    assert hificl(capfd, "gc", "--yes")[1]["removed"]
    assert sorted((copy.folder / "runs").glob("*/config.json")) == kept
    shutil.rmtree(copy.folder / "evaluations/studies")
    status, _, line = hificl(capfd, "gc", "--yes")
    assert status == 2 and "no study" in line and len(list((copy.folder / "runs").glob("*/config.json"))) == len(kept)


def test_a_measured_study_is_reported_and_traced(copy, capfd):
    latent = {
        "title": "Distance", "backbones": ["idefics2-8b-base"], "tasks": ["vqav2"],
        "measure": "latent_distance", "measured": {"num_shots": 2},
        "methods": {"zero-shot": None, "icl-2": {"method": "icl-k", "num_shots": 2}, "mimic": None},
    }  # fmt: skip
    copy.change(lambda raw: raw["studies"].update(latent=latent))
    forget()
    status, found, line = hificl(capfd, "study", "latent")
    assert status == 0, line
    written = json.loads((copy.folder / "evaluations/studies/latent.json").read_text())
    cells = {cell["row"]: cell for cell in written["cells"]}
    assert cells["icl-2"]["value"] == 0 < cells["mimic"]["value"]
    assert "Distance" in Path(found["page"]).read_text()
    status, found, line = hificl(capfd, "trace", "--study", "latent", "--cell", "mimic:vqav2")
    assert status == 0 and "measurement" in {check["what"] for check in found["checks"]}, line
    spoil(copy.folder / cells["mimic"]["measurement"])
    assert hificl(capfd, "trace", "--study", "latent", "--cell", "mimic:vqav2")[0] == 1
