"""Files and folders that are there whole or not at all, also after a crash or on a full disk."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.errors import WorkError

# how safetensors and torch.save say that a write failed, which they raise as no OSError
WRITERS = ("No space left on device", "PytorchStreamWriter failed")


def write_atomic(path: Path, text: str) -> None:
    """Write `text` to `path` so that a reader sees the old file or the whole new one, also after a crash.

    Raises:
        WorkError: the disk is full or the folder cannot be written.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", dir=path.parent, prefix=f".{path.name}.", delete=False, encoding="utf-8"
        ) as f:
            temporary = f.name
            f.write(text)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        if temporary and os.path.exists(temporary):
            os.unlink(temporary)
        raise disk_error(error, path) from error


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
    temporary = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
        yield temporary
        for path in temporary.rglob("*"):
            if path.is_file():
                handle = os.open(path, os.O_RDONLY)
                try:
                    os.fsync(handle)
                finally:
                    os.close(handle)
        if target.exists():
            old = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.old."))
            os.replace(target, old / target.name)
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
        if temporary is not None and temporary.exists():
            shutil.rmtree(temporary, ignore_errors=True)
