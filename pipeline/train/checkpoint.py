"""Epoch checkpoints of a trial: whole or absent, the one before kept, damage found by digest.

checkpoint/epoch-0003/state.json    a `CheckpointState`, with the digests of the other files
checkpoint/epoch-0003/...           the engine's own files (adapter, optimiser)
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

from pipeline.core.errors import InputError
from pipeline.core.files import file_digest, folder_atomic
from pipeline.records import NewerRecord
from pipeline.records.trial import AGAIN, CheckpointState

KEPT = 2  # the newest, and one generation back in case the newest is damaged


def save(folder: Path, state: CheckpointState, write: Callable[[Path], None]) -> None:
    """Write a checkpoint: `write` fills the folder, `state` and the digests are added.

    Raises:
        WorkError: the disk is full; older checkpoints are untouched.
    """
    with folder_atomic(folder / f"epoch-{state.epoch:04d}") as temporary:
        write(temporary)
        files = {str(p.relative_to(temporary)): file_digest(p) for p in sorted(temporary.rglob("*")) if p.is_file()}
        text = state.model_copy(update={"files": files}).text(indent=None)
        (temporary / "state.json").write_text(text, encoding="utf-8")
    for old in epochs(folder)[:-KEPT]:
        shutil.rmtree(folder / f"epoch-{old:04d}", ignore_errors=True)


def move_into(source: Path, target: Path) -> None:
    """Move everything in `source` to `target`, and `source` away."""
    for entry in source.iterdir():
        entry.replace(target / entry.name)
    source.rmdir()


def epochs(folder: Path) -> list[int]:
    """Return the epochs that have a checkpoint, oldest first."""
    names = (re.fullmatch(r"epoch-(\d+)", path.name) for path in folder.glob("epoch-*"))
    return sorted(int(match.group(1)) for match in names if match)


def newest(folder: Path) -> tuple[Path, CheckpointState] | None:
    """Return the newest undamaged checkpoint and its state, or None; damaged ones are removed.

    Raises:
        InputError: it was written by newer code.
    """
    for epoch in reversed(epochs(folder)):
        path = folder / f"epoch-{epoch:04d}"
        state = _intact(path)
        if state is not None:
            return path, state
        shutil.rmtree(path, ignore_errors=True)
    return None


def _intact(path: Path) -> CheckpointState | None:
    try:
        state = CheckpointState.read(path / "state.json", AGAIN)
        intact = all(file_digest(path / name) == digest for name, digest in state.files.items())
    except NewerRecord:
        raise
    except (OSError, ValueError, InputError):  # a name that is no path is a ValueError
        return None
    return state if intact else None
