"""Checkpoints of a trial, at epochs' ends and within one: whole or absent, the one before kept, damage found by digest.

checkpoint/epoch-0003/state.json    a `CheckpointState`, with the digests of the other files
checkpoint/epoch-0003/adapter/      the best adapter by then; runs/KEY/adapter is a copy of it
checkpoint/epoch-0003/start/        the adapter as it is then, of a method that started from demonstrations
checkpoint/epoch-0003/...           the engine's own files (parameters, optimiser)
checkpoint/epoch-0003-step-000012/  the same 12 steps later, with an `EpochSoFar` of each rank; the newest alone is kept
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from pipeline.core.errors import InputError, WorkError
from pipeline.core.files import file_digest, files_below, folder_atomic, folder_digest, remove_folder
from pipeline.records import NewerRecord, Unreadable
from pipeline.records.trial import AGAIN, CheckpointState, TrialEnd

ADAPTER, START = "adapter", "start"
KEPT = 2  # the newest, and one generation back in case the newest is damaged


def save(
    folder: Path, state: CheckpointState, write: Callable[[Path], None], within: Path | None = None, step: int = 0
) -> CheckpointState:
    """Write a checkpoint: `write` fills the folder, `state` and the digests are added; return the state with them.

    Args:
        folder: of the checkpoints.
        state: the trial's.
        write: called with a folder.
        within: see `core.files.write_atomic`.
        step: how many steps of the next epoch are behind the trial.

    Raises:
        Superseded: `within` is gone; all checkpoints are untouched.
        WorkError: the disk is full, or the adapter is not the one that was kept; older checkpoints are untouched.
    """
    with folder_atomic(place(folder, state.epoch, step), within) as temporary:
        write(temporary)
        digest = folder_digest(temporary / ADAPTER)
        if state.best is not None and digest is not None:
            if state.best.adapter_digest not in (None, digest):
                raise WorkError(f"the adapter of epoch {state.best.epoch} is damaged", where=str(folder))
            best = state.best.model_copy(update={"adapter_digest": digest})
            state = state.model_copy(update={"best": best})
        files = {str(path.relative_to(temporary)): file_digest(path) for path in files_below(temporary)}
        state = state.model_copy(update={"files": files})
        (temporary / "state.json").write_text(state.text(indent=None), encoding="utf-8")
    steps = [position for position in _positions(folder) if position[1] and position != (state.epoch, step)]
    for old in [*((epoch, 0) for epoch in epochs(folder)[:-KEPT]), *steps]:
        remove_folder(place(folder, *old), within)
    return state


def place(folder: Path, epoch: int, step: int = 0) -> Path:
    """Return the folder of an epoch's checkpoint, or of one so many steps later."""
    return folder / (f"epoch-{epoch:04d}" + (f"-step-{step:06d}" if step else ""))


def move_into(source: Path, target: Path) -> None:
    """Move everything in `source` to `target`, and `source` away."""
    for entry in source.iterdir():
        entry.replace(target / entry.name)
    source.rmdir()


def epochs(folder: Path) -> list[int]:
    """Return the epochs that have a checkpoint at their end, oldest first.

    Raises:
        Unreadable: the system does not let the folder be read now.
    """
    return [epoch for epoch, step in _positions(folder) if not step]


def _positions(folder: Path) -> list[tuple[int, int]]:
    """Return the epochs, and the steps after them, that have a checkpoint, oldest first; see `epochs`."""
    try:
        listed = [path.name for path in folder.iterdir()]  # `glob` takes a folder that cannot be read for an empty one
    except FileNotFoundError:
        return []
    except OSError as error:
        raise Unreadable.of(error, folder) from error
    names = (re.fullmatch(r"epoch-(\d+)(?:-step-(\d+))?", name) for name in listed)
    return sorted((int(match[1]), int(match[2] or 0)) for match in names if match)


def newest(folder: Path, within: Path | None = None) -> tuple[Path, CheckpointState] | None:
    """Return the newest undamaged checkpoint and its state, or None; damaged ones are removed.

    Damage is in what a file holds, or that it is not there. Where the system does not let it be read (too many open
    files, a disk's or a server's error), nothing is concluded and nothing removed.

    Raises:
        InputError: it was written by newer code.
        Unreadable: the system does not let it be read now.
        Superseded: see `save`.
    """
    for position in reversed(_positions(folder)):
        path = place(folder, *position)
        state = _intact(path)
        if state is not None:
            return path, state
        remove_folder(path, within)
    return None


def stopped(folder: Path) -> TrialEnd:
    """Return the end of a trial that is stopped: what its newest undamaged checkpoint tells.

    Raises:
        InputError, Unreadable: see `newest`.
    """
    states = (_intact(place(folder, epoch)) for epoch in reversed(epochs(folder)))
    state = next((state for state in states if state is not None), None)
    return TrialEnd(status="stopped", epochs=0) if state is None else state.end("stopped")


def _intact(path: Path) -> CheckpointState | None:
    file = path / "state.json"
    try:
        state = CheckpointState.read(file, AGAIN)
        for name, digest in state.files.items():
            file = path / name
            if file_digest(file) != digest:
                return None
    except NewerRecord:
        raise
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError, ValueError, InputError):
        return None  # a name that is no path is a ValueError
    except OSError as error:
        raise Unreadable.of(error, file) from error
    return state
