"""The method, task and backbone of docs/extending.md, in a project: trained, scored, in the report."""

from __future__ import annotations

import csv
import json
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
(STUDY,) = re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL)


@pytest.fixture(scope="module")
def extended(tmp_path_factory):
    """A project on a copy of the code with the document's files; its data has the document's task."""
    from tests.e2e.conftest import TINY, make_project

    code = tmp_path_factory.mktemp("code")
    for package in ("pipeline", "stages"):
        shutil.copytree(ROOT / package, code / package, ignore=shutil.ignore_patterns("__pycache__"))
    for name, content in FILES.items():
        (code / name).write_text(content, encoding="utf-8")
    made = make_project(tmp_path_factory.mktemp("extended") / "project")
    for package in ("pipeline", "stages"):
        (made.folder / package).unlink(missing_ok=True)
        (made.folder / package).symlink_to(code / package)
    data = (made.folder / "data/real").resolve()
    (data / "vqav2").rename(data / "pets-vqa")
    name, study = re.fullmatch(r"# studies/([\w-]+)\.yaml\n(.*)", STUDY, re.DOTALL).groups()
    studies = {name: yaml.safe_load(study)}

    def edit(raw):
        raw["studies"] = studies
        raw["profiles"]["tiny"] = {
            **TINY, "backbones": ["idefics2-8b"], "tasks": ["pets-vqa"], "studies": [name],
            "sources": {"idefics2-8b": {"variant": "tiny"}},
            "train": {**TINY["train"], "epochs_below_1000": 1},
        }  # fmt: skip

    made.change(edit)
    return made, name, code


def test_the_documents_files_lie_where_such_files_lie():
    assert {str(Path(name).parent) for name in FILES} == {
        "pipeline/adapters", "pipeline/tasks", "pipeline/backbones"
    }  # fmt: skip
    assert not any((ROOT / name).exists() for name in FILES)


def test_they_are_trained_scored_and_reported(extended):
    made, study, code = extended
    made.python("-m", "stages.subsample", "pets-vqa")
    made.python("-m", "pipeline", "study", study)
    with open(made.folder / f"reports/{study}.csv", newline="") as file:
        rows = {row["method"]: row for row in csv.DictReader(file)}
    assert set(rows) == {"hificl", "prefix"} and all(row["value"] for row in rows.values())
    assert rows["prefix"]["task"] == "pets-vqa" and rows["prefix"]["backbone"] == "idefics2-8b"
    assert "Prefix tuning" in (made.folder / "reports/index.html").read_text()
    (config,) = (
        path for path in made.folder.glob("runs/*/adapter/adapter_config.json") if '"prefix"' in path.read_text()
    )
    assert json.loads(config.read_text())["options"] == {"num_virtual_tokens": 4}


def test_the_command_of_the_document_counts_it(extended):
    _, _, code = extended
    (command,) = re.findall(r"^hificl (params .*)$", TEXT, re.MULTILINE)
    done = subprocess.run(
        [sys.executable, "-m", "pipeline", *command.split()], cwd=code, capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout)["trainable"] == 2 * 32 * 32 * 4 * 128
