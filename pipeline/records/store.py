"""The trial store: one folder a trial under `runs/`, keyed by content (`records.trial_folder`), and its lock.

Resume goes by this ledger and never by Ray's history, which offers finished trials again.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from pipeline.config.trial import TrialConfig
from pipeline.core.errors import InputError
from pipeline.core.progress import say
from pipeline.records.epoch import EpochReport
from pipeline.records.trial import Provenance, TrialEnd, TrialRecord
from pipeline.records.trial_folder import TrialFolder

_WAIT_SECONDS = 1.0


class TrialStore:
    """Reads and writes `runs/`.

    What is read of a trial raises InputError where the file is damaged or newer than this code.

    Args:
        root: the folder, usually `runs`.
    """

    def __init__(self, root: Path | str = "runs") -> None:
        self.root = Path(root)

    def folder(self, key: str) -> Path:
        """Return the folder of the trial `key`."""
        return self.root / key

    def trial(self, key: str) -> TrialFolder:
        """Return the records of the trial `key`."""
        return TrialFolder(self.folder(key))

    def open(self, config: TrialConfig, provenance: Provenance | None = None) -> Path:
        """Create the folder of a trial and its config.json.

        One that is there is kept; where the code has moved on since, it names both versions.

        Args:
            config: the trial.
            provenance: None: a slot takes the trial up, which knows none.
        """
        trial = self.trial(config.key)
        record = TrialRecord(config=config.model_dump(mode="json"), provenance=provenance or Provenance())
        if not trial.begun:
            trial.begin(record)
        elif provenance is not None and (before := trial.record()).provenance.commit != provenance.commit:
            trial.begin(before.resumed(record))
        return trial.path

    def config(self, key: str) -> TrialConfig:
        """Return the configuration that the trial was started with."""
        return self.trial(key).config()

    def record(self, key: str) -> TrialRecord:
        """Return what the trial was started with, as it was written, and where it came from."""
        return self.trial(key).record()

    def done(self, key: str) -> TrialEnd | None:
        """Return how the trial ended, or None while it is open."""
        return self.trial(key).end()

    def finished(self, key: str) -> bool:
        """Whether the trial ended in a way that training again would repeat."""
        end = self.done(key)
        return end is not None and end.final

    def finish(self, key: str, end: TrialEnd) -> None:
        """Close a trial; the last thing that is written."""
        self.trial(key).finish(end)

    def reopen(self, key: str) -> None:
        """Take back the end of a trial that was stopped or failed, so that it is continued."""
        self.trial(key).reopen()

    def epochs(self, key: str) -> list[EpochReport]:
        """Return the metrics by epoch."""
        return self.trial(key).epochs()

    def all_keys(self) -> list[str]:
        """Return the keys of all trials, open and done."""
        return sorted(p.parent.name for p in self.root.glob("*/config.json"))

    @contextmanager
    def lock(self, what: str, *, wait: bool = False) -> Iterator[None]:
        """Hold the store for one sweep or evaluation.

        Args:
            what: who holds it, for the others.
            wait: until it is free, where another process holds it.

        Raises:
            InputError: another process holds it; the message names it.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        note, lock = self.root / ".lock", FileLock(self.root / ".lock")
        try:
            lock.acquire(blocking=False)
        except Timeout:
            holder = note.read_text(encoding="utf-8").strip() or "another process"
            if not wait:
                raise InputError(
                    f"held by {holder}", where=str(self.root), way_out="Wait for it to end, or stop it, and run again"
                ) from None
            say(f"{what} waits for {self.root}, held by {holder}")
            lock.acquire(poll_interval=_WAIT_SECONDS)
        try:
            since = time.strftime("%F %T")
            note.write_text(f"{what}, pid {os.getpid()} on {os.uname().nodename}, since {since}", encoding="utf-8")
            yield
        finally:
            note.write_text("", encoding="utf-8")
            lock.release()
