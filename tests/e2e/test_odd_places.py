"""The whole pipeline below folders of odd names, its environment too, with a TMPDIR as clusters set it."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.conftest import environment, make_project
from tests.support import odd_paths

pytestmark = [pytest.mark.e2e, pytest.mark.long, pytest.mark.timeout(900)]

# MLflow decodes a model's path even where it is no address, so below a `%` it is asked for a copy elsewhere.
LOADED = """
import base64, sys, tempfile
from pathlib import Path
import mlflow, pandas
from pipeline.tracking import store
mlflow.set_tracking_uri(store.resolve_address(None, Path.cwd()))
(model,) = mlflow.search_registered_models()
asked = pandas.DataFrame([{"image": base64.b64encode(Path(sys.argv[1]).read_bytes()).decode(), "question": "Which?"}])
with tempfile.TemporaryDirectory(dir="/tmp") as copy:
    loaded = mlflow.pyfunc.load_model(f"models:/{model.name}@best", dst_path=copy)
    print(len(loaded.predict(asked)))
"""


def test_a_project_does_not_mind_where_it_lies(tmp_path):
    project = make_project(tmp_path.joinpath("home", *odd_paths.NAMES))
    project.change(lambda raw: raw["studies"]["small"].update(methods={"zero-shot": None, "hificl": None}))
    temporary = tmp_path / ("x" * 60) / "a job's #1 %20 tmp?"
    temporary.mkdir(parents=True)
    python = project.folder / ".venv/bin/python"
    own = {**environment(), "TMPDIR": str(temporary), "PATH": f"{python.parent}:{os.environ['PATH']}"}

    def run(*words: str, by: Path = python) -> str:
        done = subprocess.run(
            [by, *words], cwd=project.folder, env=own, capture_output=True, text=True, timeout=600, check=False
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        return done.stdout

    run("-m", "dvc", "repro")
    with (project.folder / "reports/small.csv").open(newline="") as file:
        assert [(row["method"], bool(row["value"])) for row in csv.DictReader(file)] == [
            ("zero-shot", True), ("hificl", True),
        ]  # fmt: skip
    assert "up to date" in run("-m", "dvc", "repro")
    assert json.loads(run("-m", "pipeline", "trace", "--all"))["intact"]
    (adapter,) = (project.folder / "runs").glob("*/adapter")
    picture = str(next((project.folder / "data/real/images").rglob("*.jpg")))
    said = run("-m", "pipeline", "predict", "--adapter", str(adapter), "--image", picture, "--question", "Which?")
    assert json.loads(said)["trial"] == adapter.parent.name
    assert run("-c", LOADED, picture, by=Path(sys.executable)).splitlines()[-1] == "1"
    assert {path.name for path in tmp_path.iterdir()} == {"home", temporary.parent.name}, "nothing lies outside"
    assert [path.name for path in (tmp_path / "home").iterdir()] == [odd_paths.NAMES[0]]
