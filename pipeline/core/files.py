"""Files and folders that are there whole or not at all, also after a crash or on a full disk."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import secrets
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pipeline.core.errors import HificlError, InputError, WorkError

GONE = ".gone."  # begins the name of a folder that is being removed
_TRIES = 100
_PASSING = (errno.EMFILE, errno.ENFILE, errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOMEM)

# how safetensors and torch.save say that a write failed, which they raise as no OSError
WRITERS = ("No space left on device", "PytorchStreamWriter failed")


class Superseded(WorkError):
    """Another process has taken up what this one was working on."""


def write_atomic(path: Path, content: str | bytes, within: Path | None = None) -> None:
    """Write `content` to `path` so that a reader sees the old file or the whole new one, also after a crash.

    Args:
        path: the file.
        content: its bytes, or its text, written as UTF-8.
        within: the folder of this process alone that the file is written in first, on the same disk; None: beside it.

    Raises:
        Superseded: `within` is gone, and `path` is as it was.
        WorkError: the disk is full or the folder cannot be written.
    """
    temporary = _beside(path, within)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # not by `tempfile`, whose files only their owner may read: reports and adapters are for a team
        with temporary.open("xb") as f:
            f.write(content.encode() if isinstance(content, str) else content)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        raise _write_error(error, path, within) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def _beside(path: Path, within: Path | None = None) -> Path:
    """Return a name in the same folder, or in the folder `within`, that nobody else uses."""
    return (within or path.parent) / f".{path.name}.{uuid.uuid4().hex[:12]}"


def _write_error(error: OSError, path: Path, within: Path | None) -> WorkError:
    if within is None or within.exists():
        return disk_error(error, path)
    return Superseded("not written: another process has taken the trial up, and goes on with it", where=str(path))


def remove_folder(folder: Path, within: Path | None = None) -> None:
    """Remove a folder: at once by another name, then file by file. One that is not there is none.

    Raises:
        Superseded: `within` is gone (see `write_atomic`), and `folder` is as it was.
        WorkError: it cannot be removed.
    """
    gone = (within or folder.parent) / f"{GONE}{uuid.uuid4().hex[:12]}"
    try:
        os.replace(folder, gone)
    except OSError as error:
        if isinstance(error, FileNotFoundError) and (within is None or within.exists()):
            return
        raise _write_error(error, folder, within) from error
    for _ in range(_TRIES):  # whoever still writes into it may add a file meanwhile
        shutil.rmtree(gone, ignore_errors=True)
        if not gone.exists():
            return
    raise disk_error(OSError(errno.ENOTEMPTY, "files in it cannot be removed"), folder)


def remove_file(path: Path, within: Path | None = None) -> None:
    """Remove a file. One that is not there is none.

    Raises:
        Superseded: `within` is gone (see `write_atomic`), and `path` is as it was.
        WorkError: it cannot be removed.
    """
    try:
        if within is None:
            path.unlink(missing_ok=True)
            return
        gone = _beside(path, within)
        os.replace(path, gone)
        gone.unlink()
    except OSError as error:
        if isinstance(error, FileNotFoundError) and within is not None and within.exists():
            return
        raise _write_error(error, path, within) from error


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


def read_error(error: OSError, what: str, where: str, way_out: str) -> HificlError:
    """Explain a failed read of the user's files: wrong as they are, or, where it may pass, work to be tried again."""
    return (WorkError if error.errno in _PASSING else InputError)(what, where=where, way_out=way_out)


@contextmanager
def folder_atomic(target: Path, within: Path | None = None) -> Iterator[Path]:
    """Give a temporary folder to fill, which takes the place of `target` when the block ends well.

    Args:
        target: the folder.
        within: see `write_atomic`.

    Raises:
        Superseded: `within` is gone, and `target` is as it was.
        WorkError: the disk is full or the folder cannot be written; `target` is as it was.
    """
    temporary = _beside(target, within)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        mode = temporary.stat().st_mode
        yield temporary
        for path in files_below(temporary):
            path.chmod(mode & 0o666)  # safetensors' files only their owner may read
            handle = os.open(path, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
        if target.exists():
            old = _beside(target, within)
            os.replace(target, old)
            os.replace(temporary, target)
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.replace(temporary, target)
        sync_folder(target.parent)
    except OSError as error:
        raise _write_error(error, target, within) from error
    except Exception as error:
        if within is not None and not within.exists():
            raise _write_error(OSError(str(error)), target, within) from error
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


def files_below(folder: Path) -> list[Path]:
    """Return the files in a folder and below it, sorted; none where there is no folder.

    Raises:
        OSError: a folder cannot be read, which `Path.rglob` takes for an empty one.
    """
    files: list[Path] = []
    with suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                files += files_below(Path(entry.path))
            elif entry.is_file():
                files.append(Path(entry.path))
    return sorted(files)


def folder_digest(folder: Path) -> str | None:
    """Return the sha256 (hex) over names and bytes of a folder's files; None where there is no file.

    Raises:
        OSError: a file or folder cannot be read.
    """
    files = files_below(folder)
    content = hashlib.sha256()
    for file in files:
        content.update(file.relative_to(folder).as_posix().encode() + b"\0" + file.read_bytes())
    return content.hexdigest() if files else None


def secret(path: Path, length: int) -> str:
    """Return the secret in a file of mode 600, which is made at its first use, of `length` random bytes."""
    if not path.exists():
        with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}.", encoding="ascii") as draft:
            draft.write(secrets.token_urlsafe(length))  # its mode is 600
            draft.flush()
            with suppress(FileExistsError):  # of several processes at once, one wins
                os.link(draft.name, path)
    path.chmod(0o600)
    return path.read_text(encoding="ascii").strip()


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
