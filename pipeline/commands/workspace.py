"""`hificl workspace`: a folder beside this one that runs another profile; `hificl gc`: what no report refers to."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.commands.parser import CommandLine, profile_name
from pipeline.core.errors import HificlError, InputError, WorkError
from pipeline.core.terminal import Answer, Fields

if TYPE_CHECKING:
    from pipeline.config.load import Params
    from pipeline.core.plain_yaml import Json
    from pipeline.records.evaluation import Evaluations

LINKS = (".venv", "pipeline", "stages", "checkpoints", "weights")
_STANDARD_ERROR = 2
PAGE = "page.html"  # what `dvc plots` fills, below .dvc
_REAL, _MADE = "data/real", "data/miniature"


def register(line: CommandLine) -> None:
    """Add the verbs."""
    parser = line.verb("run", "workspace", _workspace, "make a folder that runs another profile beside this one")
    parser.add_argument("folder")
    profile_name(parser.add_argument("--profile", required=True))
    parser.add_argument("--data", help="folder of the official files")

    parser = line.verb("check", "gc", _gc, "show what no report refers to; --yes removes it", answers=True)
    parser.add_argument("--yes", action="store_true", help="remove what is shown")


def _workspace(args: argparse.Namespace) -> None:
    """Make the folder, or bring it up to date."""
    make_workspace(Path(args.folder), profile=args.profile, data=Path(args.data) if args.data else None)


def make_workspace(folder: Path, *, profile: str, data: Path | None = None) -> None:
    """Make (or bring up to date) the workspace `folder` for `profile`.

    It is a DVC project without Git of its own: the code, the environment, the weights, profiles and studies are links
    into this one, `params.yaml` differs in the one line that names the profile, and `data/real` points to `data`.

    Raises:
        InputError: no such profile, no such data folder, a link in it that leads nowhere, or not called from a
            project's root.
    """
    from pipeline.config.load import FOLDERS, PARAMS, load

    root = Path.cwd()
    params = load(root / PARAMS, profile=profile)
    if data is not None:
        check_links(data)
    made_here, given = params.run.data_root == _MADE, data is not None
    gone = {"backbone"} | (set() if made_here else {"world"}) | (set() if given else {"official"})
    absent = (set() if made_here else {_MADE, "checkpoints"}) | (set() if given else {_REAL})
    lay_out(folder, root, profile, stages_of(root, gone=gone, absent=absent))
    for name in FOLDERS.values():
        _link(folder / name, root / name)
    if data is not None:
        (folder / "data").mkdir(exist_ok=True)
        _link(folder / _REAL, data.resolve())


def lay_out(folder: Path, root: Path, profile: str, pipeline: Json) -> None:
    """Make a workspace but for its data, profiles and studies: a DVC project with the code of `root`."""
    from pipeline.config.load import PARAMS
    from pipeline.core import plain_yaml

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
    from pipeline.core import plain_yaml

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


def _gc(args: argparse.Namespace) -> Answer:
    """Show or remove it in the current folder."""
    from pipeline.config.load import load

    return Fields(asdict(collect(load(), Path.cwd(), remove=args.yes)))


@dataclass(frozen=True)
class Unreferred:
    """What no report refers to: folders, files, runs and models, and the bytes of the first two.

    Attributes:
        kept_trials: how many trials stay.
        removed: whether it is gone now.
    """

    trials: list[str]
    evaluations: list[str]
    mlflow_runs: list[str]
    models: list[str]
    bytes: int
    kept_trials: int
    removed: bool


def collect(params: Params, root: Path, *, remove: bool) -> Unreferred:
    """Return the trials, evaluations and MLflow runs that no study's evaluation refers to; remove them if asked.

    What the profile's studies plan is kept also where it is not evaluated yet, as are the candidates of a search.

    Args:
        params: the project's.
        root: the project's folder.
        remove: whether to remove what was found. MLflow runs go to MLflow's own bin (`mlflow gc` empties it);
            registered models of trials that go are taken out of the registry.

    Raises:
        InputError: nothing was evaluated, so that nothing is referred to; or a sweep holds the store.
    """
    from pipeline.records.evaluation import Evaluations
    from pipeline.records.store import TrialStore
    from pipeline.tracking.client import Tracker
    from pipeline.tracking.registry import ModelRegistry

    kept = Evaluations(root / "evaluations")
    if not kept.studies():
        raise InputError(
            "no study was evaluated, so nothing says what is referred to",
            where=str(root / "evaluations/studies"), way_out="Run dvc repro first",
        )  # fmt: skip
    store = TrialStore(root / "runs")
    with store.lock("hificl gc"):
        trials, evaluations = _referred(kept)
        trials |= _planned(params, root)
        old_trials = [store.folder(key) for key in store.all_keys() if key not in trials]
        every = sorted([*(root / "evaluations").glob("*.json"), *(root / "evaluations/measures").glob("*.json")])
        old_files = [file for file in every if str(file.relative_to(root)) not in evaluations]
        tracker = Tracker(params.tracking.uri, root)
        registry = ModelRegistry(tracker)
        gone = {folder.name for folder in old_trials}
        runs = sorted(run.run_id for every in tracker.runs_of(gone).values() for run in every)
        models = registry.models_of(gone)
        unreferred = Unreferred(
            trials=[str(folder.relative_to(root)) for folder in old_trials],
            evaluations=[str(file.relative_to(root)) for file in old_files],
            mlflow_runs=runs, models=[f"{name}/{version}" for name, version in models],
            bytes=sum(_size(path) for path in (*old_trials, *old_files)),
            kept_trials=len(trials), removed=remove,
        )  # fmt: skip
        if remove:
            registry.delete(models)
            tracker.delete_runs(runs)
            for folder in old_trials:
                shutil.rmtree(folder)
            for file in old_files:
                file.unlink()
    return unreferred


def _referred(evaluations: Evaluations) -> tuple[set[str], set[str]]:
    """Return the trials and the files that the studies' cells name."""
    cells = [cell for name in evaluations.studies() for cell in evaluations.study(name).cells]
    trials = {cell.trial for cell in cells} | {row.trial for cell in cells for row in cell.candidates}
    files = {f"evaluations/{cell.evaluation}.json" for cell in cells} | {cell.measurement for cell in cells}
    return {key for key in trials if key is not None}, {file for file in files if file is not None}


def _planned(params: Params, root: Path) -> set[str]:
    from pipeline.plan.plan import all_cells, make_plan, places

    folders = places(root)
    try:
        return set(make_plan(params, all_cells(params, params.run.studies, folders), folders).trials)
    except HificlError as error:
        # what is planned cannot be told, so nothing may be taken away
        raise InputError(f"the profile's studies cannot be laid out: {error}", where="hificl gc") from error


def _size(path: Path) -> int:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)
