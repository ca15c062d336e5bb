"""Names of folders that Linux allows and that somebody's program takes for more than a name."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

NAMES = ("my lab ü #3", "a%20b", "who?", "v1.2+x", "it's")


def linked(source: Path, target: Path) -> None:
    """Copy a folder, by hard links where both lie on one disk: a program sees its own place, not the original's."""

    def one(file: str, copy: str) -> None:
        try:
            os.link(file, copy)
        except OSError:
            shutil.copy2(file, copy)

    shutil.copytree(source, target, copy_function=one, ignore=shutil.ignore_patterns("__pycache__"))
