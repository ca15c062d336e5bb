"""`hificl workspace`: a folder beside this one that runs another profile, with stores and reports of its own."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from pipeline.commands.parser import CommandLine, profile_name
from pipeline.core.errors import InputError, WorkError

_LINKS = (".venv", "pipeline", "stages", "checkpoints", "weights")
PAGE = "page.html"  # what `dvc plots` fills, below .dvc
_REAL, _MADE = "data/real", "data/miniature"


def register(line: CommandLine) -> None:
    """Add the verb."""
    parser = line.verb("run", "workspace", workspace, "make a folder that runs another profile beside this one")
    parser.add_argument("folder")
    profile_name(parser.add_argument("--profile", required=True))
    parser.add_argument("--data", help="folder of the official files")


def workspace(args: argparse.Namespace) -> None:
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
    from pipeline.core import plain_yaml

    root = Path.cwd()
    params = load(root / PARAMS, profile=profile)
    text = plain_yaml.with_value((root / PARAMS).read_text(encoding="utf-8"), PARAMS, "profile", profile)
    if data is not None:
        check_links(data)
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / PARAMS, text)
    pipeline = _pipeline(root, made_here=params.run.data_root == _MADE, given=data is not None)
    _write(folder / "dvc.yaml", plain_yaml.write(pipeline))
    for name in (*_LINKS, *FOLDERS.values()):
        _link(folder / name, root / name)
    if data is not None:
        (folder / "data").mkdir(exist_ok=True)
        _link(folder / _REAL, data.resolve())
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


def _pipeline(root: Path, *, made_here: bool, given: bool) -> dict[str, Any]:
    """Return dvc.yaml with the stages that a workspace needs; `backbone` is the root's own.

    Args:
        root: the project's root.
        made_here: whether the profile reads the miniature's world, and not official files.
        given: whether the workspace has official files.
    """
    from pipeline.core import plain_yaml

    whole: dict[str, Any] = plain_yaml.read_file(root / "dvc.yaml")
    gone = {"backbone"} if made_here else {"backbone", "world"}
    gone |= set() if given else {"official"}
    absent = set() if given else {_REAL}
    absent |= set() if made_here else {_MADE, "checkpoints"}
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
    """Run dvc in a folder; `shown` lets its output through.

    Raises:
        WorkError: it failed.
    """
    # DVC is started as the program it is: its Python interface would pull it into every import of this module
    words = [sys.executable, "-m", "dvc", *args]
    done = subprocess.run(words, cwd=folder, capture_output=not shown, text=True, check=False, env=active())
    if done.returncode:
        raise WorkError(f"dvc {args[0]} failed: {(done.stderr or '').strip()[-300:]}".rstrip(": "), where=str(folder))
