"""What an epoch of a trial gives: its metrics, its training losses, and what a slot says of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

from pydantic import Field

from pipeline.records.base import Count, Number, Record

Status = Literal["finished", "diverged", "stopped", "failed"]  # how a trial ended


class EpochReport(Record):
    """The metrics of one epoch: a line of metrics.jsonl. What was not measured is None.

    Attributes:
        epoch: its number, from 1.
        train_loss: mean over the epoch, as are its parts.
        gradient_norm: of the last step, before clipping; not a number where an engine gives none.
        learning_rate: of the last step.
        selection_score: on the selection split; `selection_loss` where the loss chooses.
        objective: what the best epoch is chosen by; higher is better.
        seconds: of training and scoring, `train_seconds` of training alone.
    """

    sparse: ClassVar[bool] = True

    epoch: Count
    train_loss: Number | None = None
    ground_truth_loss: Number | None = None
    alignment_loss: Number | None = None
    gradient_norm: Number | None = None
    learning_rate: Number | None = None
    selection_score: Number | None = None
    selection_loss: Number | None = None
    objective: Number | None = None
    seconds: Number | None = None
    train_seconds: Number | None = None

    @classmethod
    def among(cls, fields: Mapping[str, Any]) -> Self:
        """Return the report among other fields, such as those that Ray Tune adds to it."""
        return cls.model_validate({name: fields[name] for name in cls.model_fields if name in fields})

    @property
    def metrics(self) -> dict[str, float]:
        """What was measured, by name, without the epoch's number."""
        values = {name: getattr(self, name) for name in type(self).model_fields if name != "epoch"}
        return {name: value for name, value in values.items() if value is not None}


class StepLosses(Record):
    """The training loss of every step of one epoch: a line of losses.jsonl."""

    epoch: Count
    train_loss: tuple[Number, ...] = Field(strict=False)


@dataclass(frozen=True)
class TrialReport:
    """What a slot says of a trial: an epoch that is complete, or its end, or both.

    Attributes:
        key: the trial's.
        epoch: how many epochs it has behind it; the one in which it diverged counts.
        metrics: the epoch's; None where it ended without completing one.
        end: how it ended; None while it goes on.
        error: why it failed.
    """

    key: str
    epoch: int
    metrics: EpochReport | None = None
    end: Status | None = None
    error: str | None = None
