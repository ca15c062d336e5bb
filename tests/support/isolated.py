"""A folder for sys.path that holds some of the installed packages and what they need in turn, and nothing else."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement


def needed(requirements: Iterable[str]) -> set[str]:
    """Return the distributions that fulfil the requirements here, with all that they require."""
    names: set[str] = set()
    todo = [Requirement(line) for line in requirements]
    seen: set[str] = set()
    while todo:
        requirement = todo.pop()
        if str(requirement) in seen or (requirement.marker and not requirement.marker.evaluate()):
            continue
        seen.add(str(requirement))
        found = metadata.distribution(requirement.name)
        names.add(found.name)
        for line in found.requires or ():
            inner = Requirement(line)
            extras = [{"extra": extra} for extra in (*requirement.extras, "")]
            if inner.marker is None or any(inner.marker.evaluate(extra) for extra in extras):
                inner.marker = None
                todo.append(inner)
    return names


def site_of(folder: Path, requirements: Iterable[str]) -> Path:
    """Fill `folder` with links to the files of the distributions that the requirements name; return it."""
    folder.mkdir(parents=True)
    for name in needed(requirements):
        found = metadata.distribution(name)
        root = Path(str(found.locate_file("")))
        tops = {Path(str(file)).parts[0] for file in found.files or () if not str(file).startswith("..")}
        for top in tops - {"__pycache__"}:
            _link(folder / top, root / top)
    return folder


def _link(link: Path, target: Path) -> None:
    """Link a file or folder; folders that several distributions share (`nvidia`) are merged."""
    if link.is_symlink() and link.is_dir() and target.is_dir() and link.resolve() != target.resolve():
        raise AssertionError(f"{link} lies in two places")
    if not os.path.lexists(link):
        link.symlink_to(target)


def python(site: Iterable[Path], *words: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python with these folders on its path and no other packages; the words follow `python`."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    path = os.pathsep.join(map(str, site))
    return subprocess.run(
        [sys.executable, "-S", *words], cwd=cwd, capture_output=True, text=True, check=False, timeout=300,
        env={**kept, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1", **environment},
    )  # fmt: skip


def normal(name: str) -> str:
    """Return a distribution's name as indexes spell it."""
    return re.sub(r"[-_.]+", "-", name.lower())
