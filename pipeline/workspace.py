"""A folder that runs another profile beside this one, with its own trial store, reports and MLflow store."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from pipeline.config import PARAMS, load
from pipeline.errors import InputError, WorkError, nearest
from pipeline.schema import Profile

RUN_LINE = re.compile(r"^run: \*[\w-]+.*$", re.MULTILINE)
LINKS = (".venv", "pipeline", "checkpoints", "weights")


def create(folder: Path, *, profile: str, data: Path | None = None) -> None:
    """Make (or bring up to date) the workspace `folder` for `profile`.

    It is a DVC project without Git of its own: the code, the environment and the weights are links into this one,
    `params.yaml` differs in the one line that names the profile, and `data/real` points to `data`.

    Raises:
        InputError: no such profile, no such data folder, or not called from a project's root.
    """
    root = Path.cwd()
    params = load(root / PARAMS)
    if profile not in params.profiles:
        raise InputError(f"unknown profile '{profile}'", where=PARAMS, way_out=nearest(profile, params.profiles))
    text, count = RUN_LINE.subn(f"run: *{profile}", (root / PARAMS).read_text(encoding="utf-8"))
    if count != 1:
        raise InputError(
            "has no line `run: *PROFILE`", where=PARAMS, way_out="Write `run: *mini` for the default profile"
        )
    if data is not None and not data.is_dir():
        raise InputError("no such folder", where=str(data), way_out="Give the folder of the official files as --data")
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / PARAMS, text)
    _write(folder / "dvc.yaml", yaml.safe_dump({"stages": _stages(root, params.profiles[profile])}, sort_keys=False))
    for name in LINKS:
        _link(folder / name, root / name)
    if data is not None:
        (folder / "data").mkdir(exist_ok=True)
        _link(folder / "data/real", data.resolve())
    if not (folder / ".dvc").is_dir():
        dvc(folder, "init", "--no-scm", "--quiet")
        dvc(folder, "config", "core.analytics", "false")


def _stages(root: Path, profile: Profile) -> dict[str, Any]:
    """Return the stages of dvc.yaml that a profile needs in a workspace; `backbone` is the root's own."""
    stages: dict[str, Any] = yaml.safe_load((root / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
    del stages["backbone"]
    if profile.data_root not in stages["world"]["outs"]:  # it reads nothing of the miniature
        del stages["world"]
        for stage in stages.values():
            stage["deps"] = [dep for dep in stage.get("deps", []) if dep != "checkpoints"]
    return stages


def _write(path: Path, text: str) -> None:
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")


def _link(link: Path, target: Path) -> None:
    if not target.exists() or (link.is_symlink() and link.resolve() == target.resolve()):
        return
    if link.is_symlink():
        link.unlink()
    link.symlink_to(os.path.relpath(target, link.parent.resolve()), target_is_directory=True)


def dvc(folder: Path, *args: str, shown: bool = False) -> None:
    """Run dvc in a folder; `shown` lets its output through.

    Raises:
        WorkError: it failed.
    """
    # DVC is started as the program it is: its Python interface would pull it into every import of this module
    words = [sys.executable, "-m", "dvc", *args]
    done = subprocess.run(words, cwd=folder, capture_output=not shown, text=True, check=False)
    if done.returncode:
        raise WorkError(f"dvc {args[0]} failed: {(done.stderr or '').strip()[-300:]}".rstrip(": "), where=str(folder))


def describe(folder: Path) -> str:
    """Say where the report and the MLflow store of a folder are, and how to look at them."""
    report = folder / "reports/index.html"
    lines = [
        f"report:  {report}" if report.exists() else "report:  none yet; run `make repro`",
        f"tables:  {folder / 'reports'}/*.md and *.csv",
        f"runs:    {folder / 'mlflow.db'} (browse with `hificl ui`)",
    ]
    return "\n".join(lines)
