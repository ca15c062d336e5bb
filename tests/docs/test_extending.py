"""The method, task and backbone of docs/extending.md, in the tree and in a package: trained, scored, reported."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.conftest import ROOT

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]
TEXT = (ROOT / "docs/extending.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r"```python\n# (\S+)\n(.*?)```", TEXT, re.DOTALL))
(PACKAGE,) = re.findall(r"```toml\n(.*?)```", TEXT, re.DOTALL)
(STUDY,) = re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL)


@pytest.fixture(scope="module")
def code(tmp_path_factory):
    """A copy of the code with the document's files where such files lie."""
    folder = tmp_path_factory.mktemp("code")
    for package in ("pipeline", "stages"):
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    for name, content in FILES.items():
        (folder / name).write_text(content, encoding="utf-8")
    return folder


def install_package(source: Path, folder: Path) -> None:
    """Write the document's package into `source`, with the library's name as it says, and install it into `folder`."""
    (source / "pyproject.toml").write_text(PACKAGE)
    (source / "hificl_sink").mkdir()
    (source / "hificl_sink/__init__.py").touch()
    for name, content in FILES.items():
        written = re.sub(r"^from pipeline\.", "from hificl.", content, flags=re.MULTILINE)
        (source / "hificl_sink" / Path(name).name).write_text(written, encoding="utf-8")
    install = ["-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation", "--target"]
    subprocess.run([sys.executable, *install, str(folder), str(source)], check=True)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder on Python's path into which the document's package is installed."""
    folder = tmp_path_factory.mktemp("site")
    install_package(tmp_path_factory.mktemp("source"), folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]))
        yield folder


@pytest.fixture(scope="module")
def extended(site, tmp_path_factory):
    """A project beside which the document's package is installed; its data has the document's task."""
    from tests.e2e.conftest import TINY, make_project

    made = make_project(tmp_path_factory.mktemp("extended") / "project")
    data = (made.folder / "data/real").resolve()
    (data / "vqav2").rename(data / "pets-vqa")
    name, study = re.fullmatch(r"# studies/([\w-]+)\.yaml\n(.*)", STUDY, re.DOTALL).groups()
    studies = {name: yaml.safe_load(study)}

    def edit(raw):
        raw["studies"] = studies
        raw["profiles"]["tiny"] = {
            **TINY, "backbones": ["idefics2-8b"], "tasks": ["pets-vqa"], "studies": [name],
            "sources": {"idefics2-8b": {"variant": "tiny"}},
            "train": {**TINY["train"], "epochs_below_1000": 1}, "sweep": {"slots": 1},
        }  # fmt: skip

    made.change(edit)
    return made, name


def test_the_documents_files_lie_where_such_files_lie():
    assert {str(Path(name).parent) for name in FILES} == {
        "pipeline/adapters", "pipeline/tasks", "pipeline/backbones"
    }  # fmt: skip
    assert not any((ROOT / name).exists() for name in FILES)


def test_the_command_of_the_document_counts_it_where_such_files_lie(code):
    (command,) = re.findall(r"^hificl (params .*)$", TEXT, re.MULTILINE)
    done = subprocess.run(
        [sys.executable, "-m", "pipeline", *command.split()], cwd=code, capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout)["trainable"] == 32 * 32


def test_they_are_trained_scored_and_reported(extended):
    made, study = extended
    made.python("-m", "stages.subsample", "pets-vqa")
    made.python("-m", "pipeline", "study", study)
    with open(made.folder / f"reports/{study}.csv", newline="") as file:
        rows = {row["method"]: row for row in csv.DictReader(file)}
    assert set(rows) == {"hificl", "sink"} and all(row["value"] for row in rows.values())
    assert rows["sink"]["task"] == "pets-vqa" and rows["sink"]["backbone"] == "idefics2-8b"
    assert "Attention sink" in (made.folder / "reports/index.html").read_text()
    (config,) = (
        path for path in made.folder.glob("runs/*/adapter/adapter_config.json") if '"sink"' in path.read_text()
    )
    assert json.loads(config.read_text())["options"] == {"start": -2.0}


def test_a_run_records_the_version_of_the_package(extended):
    made, _ = extended
    configs = [json.loads(path.read_text()) for path in made.folder.glob("runs/*/config.json")]
    assert configs and all(config["provenance"]["versions"]["hificl-sink"] == "0.1.0" for config in configs)


def test_a_package_that_cannot_be_loaded_is_named(site):
    (site / "hificl_sink/sink.py").write_text("import gone")
    command = [sys.executable, "-m", "pipeline", "methods"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: package hificl-sink: its method 'sink' cannot be loaded: ModuleNotFoundErr")
