"""A trial's folder, `runs/<key>/`: the one place that reads and writes its records.

config.json      the configuration and where it came from
metrics.jsonl    one line an epoch
losses.jsonl     one line an epoch: the training loss of every step
checkpoint/      the last two epochs' states, for resuming (`train.checkpoint`)
adapter/         the chosen epoch's adapter
done.json        written last, by an atomic rename: the trial is done

All but the checkpoints' engine files and the adapter are written here, each whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipeline.config.trial import TrialConfig
from pipeline.core.errors import InputError
from pipeline.core.files import folder_digest, write_atomic
from pipeline.records.base import lines
from pipeline.records.epoch import EpochReport, StepLosses
from pipeline.records.trial import AGAIN, TrialEnd, TrialRecord

LOSSES = "losses.jsonl"


class TrialFolder:
    """The records of one trial.

    Args:
        path: its folder.
    """

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
