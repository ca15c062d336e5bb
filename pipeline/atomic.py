"""Files and folders that are there whole or not at all, also after a crash or on a full disk."""

from __future__ import annotations

import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pipeline.errors import WorkError

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
