"""Studies from samples to reports; and a folder beside the project that runs them: a DVC project without Git."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline import report
from pipeline.config.load import FOLDERS, PARAMS, Params, load
from pipeline.core import plain_yaml
from pipeline.core.errors import InputError, WorkError, require_known
from pipeline.core.plain_yaml import Json
from pipeline.core.terminal import Answer
from pipeline.plan.plan import places
from pipeline.plan.space import needed
from pipeline.pool.supervisor import Drivers
from pipeline.report import mlflow_report
from pipeline.sweep.draw import draw_task
from pipeline.sweep.evaluate import evaluate
from pipeline.sweep.train import sweep

LINKS = (".venv", "pipeline", "stages", "checkpoints", "weights")
_STANDARD_ERROR = 2
PAGE = "page.html"  # what `dvc plots` fills, below .dvc
_REAL, _MADE = "data/real", "data/miniature"
# stages of the project alone: a workspace has links to what they made
BACKBONES = {"backbone", "backbone-of-world-2", "backbone-of-world-3"}


def make_workspace(folder: Path, *, profile: str, data: Path | None = None) -> None:
    """Make (or bring up to date) the workspace `folder` for `profile`.

    It is a DVC project without Git of its own: the code, the environment, the weights, profiles and studies are links
    into this one, `params.yaml` differs in the one line that names the profile, and `data/real` points to `data`.

    Raises:
        InputError: no such profile, no such data folder, a link in it that leads nowhere, or not called from a
            project's root.
    """
    root = Path.cwd()
    params = load(root / PARAMS, profile=profile)
    if data is not None:
        check_links(data)
    made_here, given = params.run.data_root == _MADE, data is not None
    gone = BACKBONES | (set() if made_here else {"world"}) | (set() if given else {"official"})
    absent = (set() if made_here else {_MADE, "checkpoints"}) | (set() if given else {_REAL})
    lay_out(folder, root, profile, stages_of(root, gone=gone, absent=absent))
    for name in FOLDERS.values():
        _link(folder / name, root / name)
    if data is not None:
        (folder / "data").mkdir(exist_ok=True)
        _link(folder / _REAL, data.resolve())


def lay_out(folder: Path, root: Path, profile: str, pipeline: Json) -> None:
    """Make a workspace but for its data, profiles and studies: a DVC project with the code of `root`."""
    folder.mkdir(parents=True, exist_ok=True)
    text = plain_yaml.with_value((root / PARAMS).read_text(encoding="utf-8"), PARAMS, "profile", profile)
    _write(folder / PARAMS, text)
    _write(folder / "dvc.yaml", plain_yaml.write(pipeline))
    for name in LINKS:
        _link(folder / name, root / name)
    if not (folder / ".dvc").is_dir():
        dvc(folder, "init", "--no-scm", "--quiet")
        dvc(folder, "config", "core.analytics", "false")
        dvc(folder, "config", "plots.html_template", PAGE)
    for name in (PAGE, "plots"):
        _link(folder / ".dvc" / name, root / ".dvc" / name)


def check_links(data: Path) -> None:
    """See that a data folder is there, and no link in it leads nowhere: DVC reads every file below it.

    Raises:
        InputError: it is not so.
    """
    if not data.is_dir():
        raise InputError("no such folder", where=str(data), way_out="Give the folder of the official files as --data")
    seen: set[Path] = set()
    for parent, folders, files in os.walk(data, followlinks=True):
        real = Path(parent).resolve()
        if real in seen:  # links that go round in a circle
            folders.clear()
        seen.add(real)
        for name in files:
            path = Path(parent, name)
            if path.is_symlink() and not path.exists():
                raise InputError(
                    f"is a link to {path.readlink()}, which is not there", where=str(path),
                    way_out="Remove the link, or bring back what it points to",
                )  # fmt: skip


def stages_of(root: Path, *, gone: set[str], absent: set[str]) -> Json:
    """Return the project's dvc.yaml without the stages `gone` and the dependencies `absent`."""
    whole: dict[str, Any] = plain_yaml.read_file(root / "dvc.yaml")
    stages = {name: stage for name, stage in whole["stages"].items() if name not in gone}
    for stage in stages.values():
        if "deps" in stage:
            stage["deps"] = [dep for dep in stage["deps"] if dep not in absent]
    return {**whole, "stages": stages}


def _write(path: Path, text: str) -> None:
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")


def _link(link: Path, target: Path) -> None:
    if not target.exists() or (link.is_symlink() and link.resolve() == target.resolve()):
        return
    if link.is_symlink():
        link.unlink()
    link.symlink_to(os.path.relpath(target, link.parent.resolve()), target_is_directory=True)


def active() -> dict[str, str]:
    """Return this process's environment with its own programs first on PATH: dvc.yaml's `python` is this Python."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    return {**os.environ, "PATH": path}


def dvc(folder: Path, *args: str, shown: bool = False) -> None:
    """Run dvc in a folder; `shown` lets its output through, to standard error: the other is for answers.

    Raises:
        WorkError: it failed.
    """
    # DVC is started as the program it is: its Python interface would pull it into every import of this module
    words = [sys.executable, "-m", "dvc", *args]
    out, err = (_STANDARD_ERROR, None) if shown else (subprocess.PIPE, subprocess.PIPE)
    done = subprocess.run(words, cwd=folder, stdout=out, stderr=err, text=True, check=False, env=active())
    if done.returncode:
        raise WorkError(f"dvc {args[0]} failed: {(done.stderr or '').strip()[-300:]}".rstrip(": "), where=str(folder))


@dataclass(frozen=True)
class Reported(Answer):
    """Where the reports of studies are; what they say was said on standard error when they were made."""

    page: str
    studies: dict[str, list[str]]

    def record(self) -> Json:
        """Return the page, and the files by study."""
        return asdict(self)

    def shown(self) -> Iterator[str]:
        """Give the files by study."""
        yield from ("tables: " + ", ".join(files) for files in self.studies.values())


def run(studies: list[str], params: Params, root: Path) -> Reported:
    """Train, evaluate and report studies; what is done already is not done again.

    The result tables, and what became of the claims about these studies, are said at the end.

    Returns:
        The report's files by study, and the page.

    Raises:
        InputError: unknown study, or inputs that are not in order.
        WorkError: some trials failed; the others are done.
    """
    for name in studies:
        require_known("study", name, params.studies)
    draw_samples(params, studies, root)
    with Drivers() as drivers:
        sweep(params, studies, drivers, root)
        evaluate(params, studies, drivers, root)
    return report_on(studies, params, root)


def report_on(studies: list[str], params: Params, root: Path) -> Reported:
    """Write the reports of studies that are evaluated, and say what they came out as."""
    evaluations, out = root / "evaluations", root / "reports"
    for name in studies:
        report.write_study(name, params, evaluations, out)
    index = report.write_index(params, evaluations, out)
    mlflow_report.log(params, evaluations, root)
    index.say(studies)
    files = {name: [f"{out / name}.{end}" for end in ("md", "csv")] for name in studies}
    return Reported(str(index.page), files)


def draw_samples(params: Params, studies: list[str], root: Path) -> None:
    """Draw the samples that are not there yet: on a fresh clone a study is one command too."""
    folders = places(root)

    def absent() -> list[str]:
        return [task for task in needed(params, studies)[1] if not folders.manifest(task).is_file()]

    if absent() and (root / ".dvc").is_dir():
        dvc(root, "repro", "subsample", shown=True)  # what the profile's own studies need
    for task in absent():
        draw_task(params, task, root)
