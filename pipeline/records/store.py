"""The trial store: one folder a trial under `runs/`, keyed by content, and its lock.

config.json      the configuration and where it came from
metrics.jsonl    one line an epoch
losses.jsonl     one line an epoch: the training loss of every step
checkpoint/      the last two epochs' states, for resuming (`train.checkpoint`)
adapter/         the chosen epoch's adapter
done.json        written last, by an atomic rename: the trial is done

All but the checkpoints' engine files and the adapter are written here, each whole. Resume goes by this ledger and never
by Ray's history, which offers finished trials again.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from pipeline.config.trial import TrialConfig
from pipeline.core.errors import InputError
from pipeline.core.files import folder_digest, write_atomic
from pipeline.core.progress import say
from pipeline.records import lines
from pipeline.records.trial import AGAIN, EpochReport, Provenance, StepLosses, TrialEnd, TrialRecord

_WAIT_SECONDS = 1.0
LOSSES = "losses.jsonl"


class TrialStore:
    """Reads and writes `runs/`.

    What is read of a trial raises InputError where the file is damaged or newer than this code.
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
        """Hold the store for one sweep or evaluation, which is `what` others are told; `wait` until it is free.

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


class TrialFolder:
    """The records of one trial, in the folder `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.adapter, self.checkpoint = path / "adapter", path / "checkpoint"
        self.metrics, self._losses = path / "metrics.jsonl", path / LOSSES
        self._config, self._done = path / "config.json", path / "done.json"

    @property
    def begun(self) -> bool:
        """Whether there is such a trial."""
        return self._config.exists()

    def record(self) -> TrialRecord:
        """Return what the trial was started with.

        Raises:
            InputError: there is no such trial, or its record is damaged.
        """
        try:
            return TrialRecord.read(self._config, AGAIN)
        except FileNotFoundError:
            raise InputError("no such trial", where=str(self._config), way_out="Run `hificl sweep` first") from None

    def config(self) -> TrialConfig:
        """Return the configuration that the trial was started with.

        Raises:
            InputError: as `record`, or this code does not know the configuration.
        """
        return self.record().trial(str(self._config))

    def begin(self, record: TrialRecord) -> None:
        """Write what the trial is started with."""
        write_atomic(self._config, record.text())

    def end(self) -> TrialEnd | None:
        """Return how the trial ended, or None while it is open.

        Raises:
            InputError: the record is damaged.
        """
        try:
            return TrialEnd.read(self._done, AGAIN)
        except FileNotFoundError:
            return None

    def finish(self, end: TrialEnd) -> None:
        """Close the trial, with the digest of its adapter; the last thing that is written."""
        write_atomic(self._done, end.model_copy(update={"adapter_digest": folder_digest(self.adapter)}).text())

    def reopen(self) -> None:
        """Take back the end of a trial that was stopped or failed, so that it is continued."""
        self._done.unlink(missing_ok=True)

    def epochs(self) -> list[EpochReport]:
        """Return the metrics by epoch; one that was run again after a crash replaces its first try.

        Raises:
            InputError: a line is damaged, and not just the last one torn.
        """
        rows = {row.epoch: row for row in lines(EpochReport, self.metrics, AGAIN)}
        return [rows[epoch] for epoch in sorted(rows)]

    def write_epochs(self, reports: Sequence[EpochReport]) -> None:
        """Write the metrics of all epochs."""
        write_atomic(self.metrics, "".join(report.text(indent=None) + "\n" for report in reports))

    def losses(self) -> dict[int, tuple[float, ...]]:
        """Return the training loss of every step by epoch; trials of before it was kept have none.

        Raises:
            InputError: as `epochs`.
        """
        rows = {row.epoch: row.train_loss for row in lines(StepLosses, self._losses, AGAIN)}
        return dict(sorted(rows.items()))

    def add_losses(self, epoch: int, losses: Sequence[float]) -> None:
        """Keep an epoch's training loss of every step, with the seven digits that a sum of fp32 numbers has."""
        kept = {**self.losses(), epoch: tuple(float(f"{value:.7g}") for value in losses)}
        rows = (StepLosses(epoch=number, train_loss=values) for number, values in kept.items())
        write_atomic(self._losses, "".join(row.text(indent=None) + "\n" for row in rows))
