"""Adapters in MLflow's registry: what `mlflow.pyfunc` loads in a fresh process answers as `hificl predict` does."""

from __future__ import annotations

import base64
import json
import os
import re
import shlex
import sqlite3
import subprocess
import sys
from contextlib import closing
from importlib import metadata
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient
from packaging.requirements import Requirement

from pipeline.config.load import load
from pipeline.core.errors import InputError
from pipeline.evaluate.answerer import Answerer
from pipeline.plan.plan import Plan, places
from pipeline.records.store import TrialStore
from pipeline.sweep.mlflow_sync import MlflowSync
from pipeline.tracking.client import Tracker
from pipeline.tracking.provenance import head_commit
from pipeline.tracking.registry import ModelRegistry
from tests.conftest import ROOT
from tests.e2e.conftest import copied
from tests.support.isolated import python, site_of

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]
NAMES = {"idefics2-8b-base_vqav2_hificl", "idefics2-8b-base_vqav2_mimic"}
QUESTION = "What is this?"
LOAD = """
import json, sys
import mlflow, pandas as pd
mlflow.set_tracking_uri(sys.argv[1])
model = mlflow.pyfunc.load_model(sys.argv[2])
rows = pd.DataFrame(json.loads(sys.argv[3]))
answers = model.predict(rows)
example = model.predict(model.input_example)
print(json.dumps({"answers": answers, "example": example, "trial": model.metadata.metadata["trial"],
                  "columns": model.metadata.signature.inputs.input_names()}))
"""


def register(tracker: Tracker, folder: Path, trials: list[str]) -> None:
    plan = Plan(load(ROOT / "params.yaml"), places(folder))
    sync = MlflowSync(tracker, TrialStore(folder / "runs"), plan, [])
    sync.register(trials)
    sync.settle(0)


@pytest.fixture(scope="module")
def client(project) -> MlflowClient:
    return MlflowClient(f"sqlite:///{project.folder / 'mlflow.db'}")


def test_a_model_is_registered_by_backbone_task_and_method_and_the_best_has_its_alias(project, client):
    models = {model.name: model for model in client.search_registered_models()}
    assert set(models) >= NAMES
    store = TrialStore(project.folder / "runs")
    for name in NAMES:
        versions = client.search_model_versions(f"name = '{name}'")
        objectives = {one.version: store.done(one.tags["trial_key"]).objective for one in versions}
        assert all(float(one.tags["objective"]) == objectives[one.version] for one in versions)
        best = client.get_model_version_by_alias(name, "best")
        assert objectives[best.version] == max(objectives.values())


def test_registering_again_changes_nothing(project, client):
    tracker = Tracker(f"sqlite:///{project.folder / 'mlflow.db'}", project.folder)
    registered = client.search_model_versions()
    register(tracker, project.folder, [one.tags["trial_key"] for one in registered])
    again = client.search_model_versions()
    assert [(one.name, one.version) for one in again] == [(one.name, one.version) for one in registered]


def test_a_model_goes_with_its_trial_and_comes_again_with_it(project, tmp_path, monkeypatch):
    made = copied(project, tmp_path / "copy")
    tracker = Tracker(f"sqlite:///{made.folder / 'mlflow.db'}", made.folder)
    client = MlflowClient(tracker.uri)
    best = client.get_model_version_by_alias("idefics2-8b-base_vqav2_mimic", "best")
    found = ModelRegistry(tracker).models_of({best.tags["trial_key"]})
    assert found == [("idefics2-8b-base_vqav2_mimic", str(best.version))]
    ModelRegistry(tracker).delete(found)
    assert ModelRegistry(tracker).models_of({best.tags["trial_key"]}) == []
    assert "best" not in client.get_registered_model("idefics2-8b-base_vqav2_mimic").aliases
    monkeypatch.chdir(tmp_path)  # no store lies here
    register(tracker, made.folder, [best.tags["trial_key"]])
    again = client.get_model_version_by_alias("idefics2-8b-base_vqav2_mimic", "best")  # a trial may have several runs
    assert again.tags["trial_key"] == best.tags["trial_key"]


def test_it_answers_in_a_fresh_process_as_predict_does(project, client, tmp_path):
    image = sorted((project.folder / "data/real/images").rglob("*.jpg"))[0]
    encoded = base64.b64encode(image.read_bytes()).decode()
    rows = [{"image": given, "question": QUESTION} for given in (encoded, f"data:image/jpeg;base64,{encoded}")]
    uri = f"sqlite:///{project.folder / 'mlflow.db'}"
    asked = [sys.executable, "-c", LOAD, uri, "models:/idefics2-8b-base_vqav2_hificl@best", json.dumps(rows)]
    done = subprocess.run(asked, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.strip().splitlines()[-1])
    own = Answerer(project.folder / "runs" / found["trial"] / "adapter", project=project.folder)
    assert found["answers"] == [own.answer(image, QUESTION)["answer"]] * 2
    assert found["columns"] == ["image", "question"] and len(found["example"]) == 1


def place_of(client: MlflowClient, name: str) -> Path:
    version = client.get_model_version_by_alias(name, "best")
    assert version.source.startswith("models:/m-")
    return Path(client.get_model_version_download_uri(version.name, version.version).removeprefix("file://"))


ALONE = """
import json, sys
import mlflow, pandas as pd
model = mlflow.pyfunc.load_model(sys.argv[1])
answers = model.predict(pd.DataFrame(json.loads(sys.argv[2])))
import hificl
print(json.dumps({"answers": answers, "code": hificl.__file__, "commit": model.metadata.metadata["commit"],
                  "ours": sorted({name.partition(".")[0] for name in sys.modules} & {"pipeline", "stages"})}))
"""


def asked_of(project) -> tuple[Path, list[dict[str, str]]]:
    image = sorted((project.folder / "data/real/images").rglob("*.jpg"))[0]
    return image, [{"image": base64.b64encode(image.read_bytes()).decode(), "question": QUESTION}]


def answer_here(project, place: Path, image: Path) -> str:
    trial = json.loads((place / "adapter_config.json").read_text())["extra"]["trial"]
    own = Answerer(project.folder / "runs" / trial / "adapter", project=project.folder)
    return own.answer(image, QUESTION)["answer"]


def test_it_answers_with_the_code_inside_beside_its_own_requirements_alone(project, client, tmp_path):
    place = place_of(client, "idefics2-8b-base_vqav2_hificl")
    wanted = (place / "requirements.txt").read_text().splitlines()
    assert all(Requirement(line).specifier.contains(metadata.version(Requirement(line).name)) for line in wanted)
    assert not [line for line in wanted if "hificl" in line or "+" in line]
    image, rows = asked_of(project)
    site = site_of(tmp_path / "site", wanted)
    done = python([site], "-c", ALONE, str(place), json.dumps(rows), cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.strip().splitlines()[-1])
    assert found["answers"] == [answer_here(project, place, image)]
    assert Path(found["code"]) == place / "code/hificl/__init__.py" and found["ours"] == []
    assert found["commit"] == (head_commit(ROOT) or "unknown")


@pytest.mark.models
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", sorted(NAMES))
def test_mlflow_makes_it_an_environment_in_which_it_answers(name, project, client, tmp_path):
    """MLflow's own program, with uv and the package index; no package of this environment is on its path."""
    place, (image, rows) = place_of(client, name), asked_of(project)
    asked = tmp_path / "asked.json"
    asked.write_text(json.dumps({"dataframe_records": rows}))
    (line,) = re.findall(r"^mlflow (models predict .*)$", (ROOT / "docs/lineage.md").read_text(), re.MULTILINE)
    words = shlex.split(re.sub(r"models:/\S+", str(place), line))
    kept = {variable: value for variable, value in os.environ.items() if not variable.startswith("PYTHON")}
    done = subprocess.run(
        [sys.executable, "-m", "mlflow", *words], cwd=tmp_path, capture_output=True, text=True, check=False,
        env=kept,
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert json.loads((tmp_path / "said.json").read_text())["predictions"] == [answer_here(project, place, image)]
    installed = re.findall(r"^ \+ ([\w-]+)==", done.stdout + done.stderr, re.MULTILINE)
    assert {"torch", "transformers", "mlflow"} <= set(installed) and "hificl-lab" not in installed


def test_nothing_in_it_is_pickled(client):
    place = place_of(client, "idefics2-8b-base_vqav2_hificl")
    files = {path.name for path in place.rglob("*") if path.is_file()}
    assert {"MLmodel", "served.py", "adapter_model.safetensors", "adapter_config.json", "input_example.json"} <= files
    assert not {name for name in files if Path(name).suffix in (".pkl", ".pickle", ".pt", ".bin")}


def test_an_image_is_a_file_or_base64(project):
    folder = next(path.parent for path in project.folder.glob("runs/*/adapter/adapter_config.json"))
    own = Answerer(folder, project=project.folder)
    for wrong in ("no-such-file.png", "not base64!", "aGVsbG8="):
        with pytest.raises(InputError):
            own.answer(wrong, QUESTION)


# where MLflow looks for files; it makes them absolute itself, and `tracking.store` keeps them true
PLACES = {
    ("experiments", "artifact_location"), ("runs", "artifact_uri"), ("logged_models", "artifact_location"),
    ("model_versions", "storage_location"),
}  # fmt: skip


def test_no_path_of_this_machine_is_in_what_mlflow_keeps(project):
    with closing(sqlite3.connect(f"{(project.folder / 'mlflow.db').as_uri()}?mode=ro", uri=True)) as store:
        tables = [name for (name,) in store.execute("select name from sqlite_master where type = 'table'")]
        columns = [(table, row[1]) for table in tables for row in store.execute(f"pragma table_info({table})")]
        found = {
            (table, column)
            for table, column in columns
            for place in (project.folder, ROOT)
            if store.execute(f"select 1 from {table} where instr({column}, ?) limit 1", (str(place),)).fetchone()  # noqa: S608
        }
    assert found == PLACES
    kept = (project.folder / "mlartifacts").rglob("*")
    files = [path for path in kept if path.is_file() and path.parent.name != "__pycache__"]  # of who loaded a model
    places = [str(place).encode() for place in (project.folder, ROOT)]
    assert len(files) > 20 and not [path for path in files if any(place in path.read_bytes() for place in places)]
