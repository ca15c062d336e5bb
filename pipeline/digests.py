"""Digests of files and folders: how a number's inputs and results are known again."""

from __future__ import annotations

import hashlib
from pathlib import Path


def file_digest(path: Path) -> str:
    """Return the sha256 (hex) of a file's bytes.

    Raises:
        OSError: it cannot be read.
    """
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def stamp(path: Path) -> tuple[int, ...]:
    """Return what a file's content cannot change without, and what is known without reading it.

    The time of the last change of the file's entry is among it: a copy with the old file's size and time (`cp -p`,
    `rsync -t`) has another.

    Raises:
        OSError: there is no such file.
    """
    state = path.stat()
    return state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns


def folder_digest(folder: Path) -> str | None:
    """Return the sha256 (hex) over names and bytes of a folder's files; None where there is no file.

    Raises:
        OSError: a file cannot be read.
    """
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    content = hashlib.sha256()
    for file in files:
        content.update(file.relative_to(folder).as_posix().encode() + b"\0" + file.read_bytes())
    return content.hexdigest() if files else None
