"""Files and folders that are there whole or not at all, also after a crash or on a full disk."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pipeline.core.errors import InputError, WorkError

# how safetensors and torch.save say that a write failed, which they raise as no OSError
WRITERS = ("No space left on device", "PytorchStreamWriter failed")


def write_atomic(path: Path, text: str) -> None:
    """Write `text` to `path` so that a reader sees the old file or the whole new one, also after a crash.

    Raises:
        WorkError: the disk is full or the folder cannot be written.
    """
    temporary = _beside(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # not by `tempfile`, whose files only their owner may read: reports and adapters are for a team
        with temporary.open("x", encoding="utf-8") as f:
            f.write(text)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        raise disk_error(error, path) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def _beside(path: Path) -> Path:
    """Return a name in the same folder that nobody else uses."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}")


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to the disk, so that a rename in it survives a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def disk_error(error: OSError, path: Path) -> WorkError:
    """Explain a failed write."""
    way_out = "Finished trials are kept; free some space (or fix the permissions) and run the same command again"
    return WorkError(f"cannot be written: {error.strerror or error}", where=str(path), way_out=way_out)


@contextmanager
def folder_atomic(target: Path) -> Iterator[Path]:
    """Give a temporary folder to fill, which takes the place of `target` when the block ends well.

    Raises:
        WorkError: the disk is full or the folder cannot be written; `target` is as it was.
    """
    temporary = _beside(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        mode = temporary.stat().st_mode
        yield temporary
        for path in temporary.rglob("*"):
            if path.is_file():
                path.chmod(mode & 0o666)  # safetensors' files only their owner may read
                handle = os.open(path, os.O_RDONLY)
                try:
                    os.fsync(handle)
                finally:
                    os.close(handle)
        if target.exists():
            old = _beside(target)
            os.replace(target, old)
            os.replace(temporary, target)
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.replace(temporary, target)
        sync_folder(target.parent)
    except OSError as error:
        raise disk_error(error, target) from error
    except Exception as error:
        if not any(words in str(error) for words in WRITERS):
            raise
        raise disk_error(OSError(errno.ENOSPC, str(error)), target) from error
    finally:
        if temporary.exists():
            shutil.rmtree(temporary, ignore_errors=True)


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


def fill(path: Path, marks: re.Pattern[str], way_out: str, made: Callable[[re.Match[str]], str | None]) -> int:
    """Replace what stands between marks by what `made` gives for each; where that is None it stays. Return how many.

    Args:
        path: the document.
        marks: matches from an opening mark to its closing one, as groups `open` and `close`.
        way_out: how marks are written, for the error.
        made: called with each match.

    Raises:
        InputError: the document is missing or has no such marks, or as `made`.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"not readable: {error.strerror}", where=str(path)) from None
    if not marks.search(text):
        raise InputError("has no marks to write between", where=str(path), way_out=way_out)
    written = 0

    def put(match: re.Match[str]) -> str:
        nonlocal written
        content = made(match)
        if content is None:
            return match[0]
        written += 1
        return f"{match['open']}\n{content}\n{match['close']}"

    filled = marks.sub(put, text)
    write_atomic(path, filled)
    return written
