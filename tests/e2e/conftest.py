"""A workspace of its own for whole runs: a tiny random Idefics2 on small made-up files in VQAv2's official shape."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from contextlib import chdir
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks.support.synthetic import SyntheticSize, write_images, write_vqav2
from pipeline.config.load import FOLDERS
from tests.conftest import ROOT
from tests.support.terminal import Terminal

TINY = {
    "backbones": ["idefics2-8b-base"],
    "tasks": ["vqav2"],
    "studies": ["small"],
    "data_root": "data/real",
    "sources": {"idefics2-8b-base": {"variant": "tiny"}},
    "methods": {},
    "sweep": {},
    "subsample": {"num_train": 8, "num_selection": 2, "num_evaluation": 4},
    "train": {"num_train_samples": 8, "num_selection_samples": 2, "epochs_below_1000": 2, "num_shots": 2},
    "evaluate": {"generation": {"max_new_tokens": 3}},
}
STUDY = {
    "title": "A small study",
    "backbones": ["idefics2-8b-base"],
    "tasks": ["vqav2"],
    "methods": {
        "zero-shot": None,
        "icl-2": {"method": "icl-k", "num_shots": 2},
        "hificl": {"search": {"rank": [1, 2]}},
        "mimic": None,
    },
}


def environment() -> dict[str, str]:
    """What a command finds: as here, with one thread, for several processes share the cores."""
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def change(folder: Path, edit) -> None:
    """Let `edit` change params.yaml, with the profiles and studies in it by name; each goes to its own file."""
    path = folder / "params.yaml"
    raw = yaml.safe_load(path.read_text())
    for kind in FOLDERS:
        raw[kind] = {file.stem: yaml.safe_load(file.read_text()) for file in (folder / kind).glob("*.yaml")}
    edit(raw)
    for kind in FOLDERS:
        if (folder / kind).is_symlink():
            (folder / kind).unlink()
        shutil.rmtree(folder / kind, ignore_errors=True)
        (folder / kind).mkdir()
        for name, content in raw.pop(kind).items():
            (folder / kind / f"{name}.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    path.write_text(yaml.safe_dump(raw, sort_keys=False))


class Project:
    """A workspace folder, and the commands a user would give in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def python(self, *args: str, check: bool = True, **settings) -> subprocess.CompletedProcess:
        done = subprocess.run(
            [sys.executable, *args], cwd=self.folder, capture_output=True, text=True, timeout=900, check=False,
            env=environment(), **settings,
        )  # fmt: skip
        if check and done.returncode:
            pytest.fail(f"{' '.join(args)} ended with {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
        return done

    def in_terminal(self, *args: str) -> str:
        """Run a command whose standard streams are a terminal, as a user's are; return what it showed."""
        terminal = Terminal(args, self.folder, environment(), self.folder / "shown.log")
        ended = terminal.process.wait(timeout=900)
        text = terminal.close()
        assert ended == 0, f"{' '.join(args)} in a terminal:\n{text[-4000:]}"
        return text

    def start(self, *args: str) -> subprocess.Popen:
        log = (self.folder / "started.log").open("w")  # noqa: SIM115 - the child writes to it
        return subprocess.Popen(
            [sys.executable, *args], cwd=self.folder, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            env=environment(),
        )  # fmt: skip

    def change(self, edit) -> None:
        change(self.folder, edit)

    def draw(self, task: str) -> None:
        """Do in this process what stage `subsample` does."""
        from pipeline.config.load import PARAMS, load
        from pipeline.sweep.draw import draw_task

        with chdir(self.folder):
            draw_task(load(PARAMS), task)

    def one_slot(self) -> None:
        """Let sweeps have one slot from now on, as `make_project(folder, slots=1)`."""
        self.change(lambda raw: raw["profiles"]["tiny"].update(sweep={"slots": 1}))


def make_project(folder: Path, **sweep: Any) -> Project:
    """Make a project of the tiny profile, with settings of its sweeps.

    `slots=1` is for a test to which trials side by side are no question: each slot's two processes take ten seconds.
    """
    from pipeline.workspace import make_workspace

    data = folder.parent / f"{folder.name}-data"
    for subset, first, images in (("train2014", 1, 24), ("val2014", 1001, 6)):
        write_vqav2(data, subset, SyntheticSize(num_questions=images, num_images=images), first_image=first)
        names = [f"images/{subset}/COCO_{subset}_{first + i:012d}.jpg" for i in range(images)]
        write_images(data, names, width=64, height=48)
    before = Path.cwd()
    os.chdir(ROOT)
    try:
        make_workspace(folder, profile="real-check", data=data)
    finally:
        os.chdir(before)
    project = Project(folder)

    def edit(raw):
        raw["profile"] = "tiny"
        raw["profiles"] = {"tiny": {**TINY, "sweep": sweep}}
        raw["studies"] = {"small": STUDY}
        raw["tracking"]["system_metrics"] = False

    project.change(edit)
    return project


def copied(project: Project, folder: Path) -> Project:
    """Copy a project to where a test may spoil it; its MLflow artifacts are the original's."""
    # In a process of its own: this one may hold mlflow.db open, and closing a file drops all locks that its process has
    # on it, which is how an SQLite database gets damaged.
    subprocess.run(["cp", "-a", str(project.folder), str(folder)], check=True)
    for left_out in (folder / "cache", folder / "runs/.tune"):
        shutil.rmtree(left_out, ignore_errors=True)
    for link in [*folder.iterdir(), *(folder / "data").iterdir()]:
        if link.is_symlink():  # they were relative to where the project lies
            target = (project.folder / link.relative_to(folder)).resolve()
            link.unlink()
            link.symlink_to(target, target_is_directory=True)
    return Project(folder)
