"""What stage `evaluate` keeps: a scored trial, a measurement, and the cells of a study."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pipeline.records.base import Count, Flag, Frozen, Json, Number, Record
from pipeline.records.trial import Machine, Provenance


class Prediction(Frozen):
    """One answer, with what a gallery shows of its sample.

    Attributes:
        sample_id: of the sample.
        prediction: the answer.
        score: None where a score is of all answers alone.
        hallucinated: words of a caption that name what its image does not show (CHAIR).
    """

    sample_id: int | str
    prediction: str = ""
    score: Number | None = None
    question: str | None = None
    references: tuple[str, ...] = ()
    image: str | None = None
    hallucinated: tuple[str, ...] = ()


class CodeVersion(Frozen):
    """The code that scored."""

    commit: str | None = None
    dirty: Flag | None = None


class Evaluation(Record):
    """One trial, scored: evaluations/<key>.json.

    Attributes:
        trial: its key.
        config: its configuration, as its own code wrote it.
        evaluation: how it was scored (`EvaluationConfig`), as the code wrote it.
        metric: name of `value`.
        metrics: `value`, and the figures that stand beside it.
        details: further figures, of the task's own.
        seconds: of answering and scoring.
        found: what a method without training found out first.
        run_id: the trial's MLflow run; None where it had none.
        adapter_digest: of the adapter when it was scored.
    """

    trial: str
    config: Json
    evaluation: Json
    metric: str
    unit: str
    value: Number | None
    metrics: dict[str, Number | None]
    num_samples: Count
    predictions: tuple[Prediction, ...]
    details: Json = {}
    seconds: Number | None = None
    found: Json = {}
    run_id: str | None = None
    adapter_digest: str | None = None
    scored_by: CodeVersion | None = None

    @property
    def left_out(self) -> list[str]:
        """What the task could not score, in sentences."""
        lines = self.details.get("left_out")
        return [str(line) for line in lines] if isinstance(lines, list) else []


class Measurement(Record):
    """One trial, measured as something else than its score: evaluations/measures/<key>.json.

    Attributes:
        measure: its name, and `settings`.
        evaluation: how the trial was scored.
        numbers: by name.
    """

    trial: str
    measure: str
    settings: Json = {}
    evaluation: Json
    run_id: str | None = None
    numbers: dict[str, Number]
    machine: Machine = Machine()


class Candidate(Frozen):
    """One trial that was tried for a cell, with its score on the selection split."""

    trial: str
    searched: Json = {}
    selection_score: Number | None = None
    status: Literal["finished", "diverged", "stopped", "failed", "missing"] | None = None


class CurvePoint(Frozen):
    """What a figure shows of an epoch."""

    epoch: Count
    train_loss: Number | None = None
    ground_truth_loss: Number | None = None
    alignment_loss: Number | None = None
    selection_score: Number | None = None


class CellResult(Frozen):
    """One number of a study at one seed.

    Attributes:
        vary: its point of the study's axes; `searched` that of its row's search.
        candidates: the trials that were tried; `trial` is the chosen one.
        evaluation: key of the score, and the digest of its file; `measurement` that of a measurement, if it is one.
        value: in `unit`; `metrics` stand beside it, in `units` where theirs is another.
        status: whether there is a number.
        epochs: of the chosen trial.
    """

    row: str
    label: str
    method: str
    backbone: str
    paper_backbone: str
    task: str
    paper_task: str
    vary: Json = {}
    seed: Count = 0
    searched: Json = {}
    candidates: tuple[Candidate, ...] = ()
    trial: str | None = None
    evaluation: str | None = None
    evaluation_digest: str | None = None
    measure: str | None = None
    measurement: str | None = None
    measurement_digest: str | None = None
    metric: str | None = None
    unit: str | None = None
    value: Number | None = None
    metrics: dict[str, Number | None] = {}
    units: dict[str, str] = {}
    run_id: str | None = None
    status: Literal["done", "missing", "failed"] = "done"
    error: str | None = None
    trainable_parameters: Count | None = None
    train_seconds: Number | None = None
    train_flops: Number | None = None
    peak_memory_bytes: Count | None = None
    chosen_epoch: Count | None = None
    epochs: tuple[CurvePoint, ...] = ()
    num_samples: Count | None = None


def _without_unread(fields: dict[str, Any]) -> dict[str, Any]:
    """Leave out of schema 1 what nothing read: the seconds of a score stand in its own file."""
    cells = fields.get("cells")
    if not isinstance(cells, list):
        return fields
    unread = ("evaluate_seconds", "experiment_id")
    return {
        **fields,
        "cells": [
            {name: value for name, value in cell.items() if name not in unread} if isinstance(cell, dict) else cell
            for cell in cells
        ],
    }


class StudyFile(Record):
    """All cells of a study: evaluations/studies/<study>.json.

    Attributes:
        selection: the split that trials were chosen on.
        protocol: whose evaluation protocol, if one was asked for.
        provenance: the code and machine that chose and scored; without the diff, which the trials' runs have.
    """

    schema_number: ClassVar[int] = 2
    upgrades: ClassVar = {1: _without_unread}

    study: str
    title: str
    profile: str = ""
    selection: str = "selection"
    protocol: str | None = None
    provenance: Provenance = Provenance()
    cells: tuple[CellResult, ...]
