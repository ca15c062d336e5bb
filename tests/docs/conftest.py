"""What the documentation's commands are run in: a copy of the small project, and names that stand for its own."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import pytest

from pipeline.cli import main
from pipeline.report import forget
from tests.e2e.conftest import Project, copied


@dataclass
class Reader:
    """Runs what a page says, in a project whose study, task and files have other names than the page's."""

    project: Project
    names: dict[str, str]

    def words(self, command: str) -> list[str]:
        """Return a command's words with the project's own names, without a shell's comment."""
        for shown, own in self.names.items():
            command = re.sub(shown, own, command)
        return shlex.split(command, comments=True)

    def hificl(self, words: list[str]) -> tuple[int, str, str]:
        """Run a command in this process; return status, standard output and standard error."""
        before, out, err = Path.cwd(), io.StringIO(), io.StringIO()
        os.chdir(self.project.folder)
        forget()
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as ended:
                main(words)
        finally:
            os.chdir(before)
        return int(ended.value.code or 0), out.getvalue(), err.getvalue()


@pytest.fixture(scope="session")
def reader(project, tmp_path_factory) -> Reader:
    made = copied(project, tmp_path_factory.mktemp("docs") / "project")
    made.one_slot()
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    study = json.loads((made.folder / "evaluations/studies/small.json").read_text())
    trial = next(cell["trial"] for cell in study["cells"] if cell["row"] == "hificl")
    with open(made.folder / "reports/small.csv", newline="") as file:
        run = next(row["run_ids"] for row in csv.DictReader(file) if row["method"] == "hificl")
    image = next((made.folder / "data/real/images").rglob("*.jpg"))
    return Reader(made, {
        r"\b(hificl-table1|hificl-table2|hificl-figure7|mimic-main)\b": "small",
        r"\bmini-vqa\b": "vqav2",
        r"\bmini-idefics2\b": "idefics2-8b-base",
        r"\bKEY\b": trial,
        r"\bRUN_ID\b": run,
        r"\b(photo\.png|FILE)\b": str(image),
        r"--profile real\b": "--profile tiny",
        r"\btrain\.epochs=1\b": "train.epochs=2",  # the project's own: `study` trains in test_extending.py
    })  # fmt: skip
