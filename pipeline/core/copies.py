"""The copy of the project that `dvc exp run --temp` and `dvc queue start` work in, and what it shares with it.

DVC makes the copy of what Git holds and removes it at the end. Trials, kept features, weights and official files are
the project's own, by links, so that an experiment trains only what is new and its trials stay. Evaluations are named by
their content and are shared file by file, for the studies' tables that lie beside them are the experiment's own.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_LINKED = ("runs", "cache", "weights")
_MADE = ("runs", "cache")  # also where the project has none yet
_OFFICIAL = "data/real"
_BY_CONTENT = ("*.json", "measures/*.json")  # of evaluations/


def main_checkout(root: Path | str) -> Path:
    """Return the project that `root` is a copy of; `root` itself where it is none."""
    root = Path(root).resolve()
    parts = root.parts
    for index in range(len(parts) - 2):
        if parts[index : index + 3] == (".dvc", "tmp", "exps"):
            return Path(*parts[:index])
    return root


def is_copy(root: Path) -> bool:
    """Return whether `root` is such a copy."""
    return main_checkout(root) != root.resolve()


def join(root: Path) -> None:
    """Link a project's trials, kept features and weights into its copy; a project itself stays as it is."""
    if not is_copy(root):
        return
    home = main_checkout(root)
    for name in _MADE:
        (home / name).mkdir(exist_ok=True)
    for name in _LINKED:
        _link(root / name, home / name)


def link_official(root: Path) -> None:
    """Link a project's official files into its copy.

    File by file, in folders of the copy's own: DVC does not look behind a link to a folder in there. Where the
    project's own folder is a link, the copy's is one too.
    """
    official, copied = main_checkout(root) / _OFFICIAL, root / _OFFICIAL
    if not is_copy(root):
        return
    if official.is_symlink():
        _link(copied, official)
        return
    copied.mkdir(parents=True, exist_ok=True)
    for parent, folders, files in os.walk(official):
        here = copied / Path(parent).relative_to(official)
        here.mkdir(exist_ok=True)
        for name in [*files, *(name for name in folders if Path(parent, name).is_symlink())]:
            _link(here / name, Path(parent, name))


def unwatched(folder: Path) -> str | None:
    """Say which links to folders lie below a folder: DVC passes over them and sees no change behind one."""
    links = [Path(at, name) for at, folders, _ in os.walk(folder) for name in folders if Path(at, name).is_symlink()]
    if not links:
        return None
    first, *others = sorted(links)
    named = f"{first} and {len(others)} more are links to folders" if others else f"{first} is a link to a folder"
    return f"{named}: DVC does not look behind, and draws nothing anew when files there change"


UNWATCHED_WAY_OUT = f"Link {_OFFICIAL} itself, or files one by one; or run `dvc repro -fs subsample` after a change"


@contextmanager
def shared_evaluations(root: Path) -> Iterator[None]:
    """Let a copy have its project's evaluations, and the project those that the block adds."""
    copied, shared = root / "evaluations", main_checkout(root) / "evaluations"
    if not is_copy(root):
        yield
        return
    _share(shared, copied)
    try:
        yield
    finally:
        _share(copied, shared)


def _link(link: Path, target: Path) -> None:
    if target.exists() and not os.path.lexists(link):
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(target.absolute(), target_is_directory=target.is_dir())


def _share(source: Path, target: Path) -> None:
    for pattern in _BY_CONTENT:
        for file in source.glob(pattern):
            link = target / file.relative_to(source)
            if link.exists():
                continue
            link.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(file, link)
            except OSError:  # a file system without hard links
                shutil.copy2(file, link)
