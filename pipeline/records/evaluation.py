"""What stage `evaluate` keeps in `evaluations/`: scored trials, measurements and the cells of studies.

evaluations/<key>.json            one scored trial: configuration, score, predictions with ids
evaluations/measures/<key>.json   one measured trial: configuration, measure and its settings, numbers
evaluations/studies/<study>.json  the cells of a study, each with its chosen trial and its candidates

A file is written whole, so one that is there is complete. `Evaluations` alone reads and writes them.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

from pipeline.core.errors import InputError, nearest
from pipeline.core.files import write_atomic
from pipeline.records import Count, Flag, Frozen, Json, Number, Record
from pipeline.records.trial import Machine, Provenance

_KEY = re.compile(r"[A-Za-z0-9_.-]+")  # what may become a file's name
_AGAIN = "Remove the file and run dvc repro evaluate again"


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


class Target(NamedTuple):
    """A task, and the digest of its samples."""

    task: str
    manifest_digest: str


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

    def logged_as(self, metric: str) -> str:
        """Return a metric's name in the trial's run, which has other tasks' scores beside its own."""
        return "_".join(["test", *([self.target.task] if self.target else []), metric])

    @property
    def target(self) -> Target | None:
        """The task that the trial is scored on, where that is not the one that it was trained on."""
        task = self.evaluation.get("task")
        return Target(str(task), str(self.evaluation.get("manifest_digest"))) if task else None

    @property
    def left_out(self) -> list[str]:
        """What the task could not score, in sentences."""
        lines = self.details.get("left_out")
        return [str(line) for line in lines] if isinstance(lines, list) else []


class LayerValues(Frozen):
    """What was measured layer by layer, by the names of the numbers that they are parts of, in their units.

    Attributes:
        by_layer: a value a layer, [L].
        by_token: a value a layer and virtual token, [L, n].
    """

    by_layer: dict[str, tuple[Number, ...]] = {}
    by_token: dict[str, tuple[tuple[Number, ...], ...]] = {}


class Measurement(Record):
    """One trial, measured as something else than its score: evaluations/measures/<key>.json.

    Attributes:
        measure: its name, and `settings`.
        evaluation: how the trial was scored.
        numbers: by name.
        layers: the same layer by layer, where the measure tells.
    """

    schema_number: ClassVar[int] = 2  # 1: without `layers`

    trial: str
    measure: str
    settings: Json = {}
    evaluation: Json
    run_id: str | None = None
    numbers: dict[str, Number]
    layers: LayerValues | None = None
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
        layers: of the measurement.
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
    layers: LayerValues | None = None
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

    schema_number: ClassVar[int] = 3  # 2: cells without `layers`
    upgrades: ClassVar = {1: _without_unread}

    study: str
    title: str
    profile: str = ""
    selection: str = "selection"
    protocol: str | None = None
    provenance: Provenance = Provenance()
    cells: tuple[CellResult, ...]


class Evaluations:
    """The records of evaluations in the folder `root`."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def path(self, key: str) -> Path:
        """Return the file of a scored trial."""
        return self.root / f"{key}.json"

    def find(self, key: str | None) -> Evaluation | None:
        """Return a scored trial, or None where its file is not there.

        Raises:
            InputError: the file is damaged.
        """
        if key is None or not _KEY.fullmatch(key):
            return None
        try:
            return Evaluation.read(self.path(key), _AGAIN)
        except FileNotFoundError:
            return None

    def read(self, key: str) -> Evaluation:
        """Return a scored trial.

        Raises:
            InputError: its file is not there, or damaged.
        """
        evaluation = self.find(key)
        if evaluation is None:
            raise InputError("no such evaluation", where=str(self.path(key)), way_out="Run dvc repro evaluate")
        return evaluation

    def scored(self) -> list[str]:
        """Return the keys of all scored trials, sorted."""
        return sorted(file.stem for file in self.root.glob("*.json") if _KEY.fullmatch(file.stem))

    def write(self, key: str, evaluation: Evaluation) -> None:
        """Keep a scored trial."""
        write_atomic(self.path(key), evaluation.text(indent=0))

    def measurement_path(self, key: str) -> Path:
        """Return the file of a measured trial."""
        return self.root / "measures" / f"{key}.json"

    def find_measurement(self, key: str) -> Measurement | None:
        """Return a measured trial, or None where its file is not there.

        Raises:
            InputError: the file is damaged.
        """
        try:
            return Measurement.read(self.measurement_path(key), _AGAIN)
        except FileNotFoundError:
            return None

    def write_measurement(self, key: str, measurement: Measurement) -> None:
        """Keep a measured trial."""
        write_atomic(self.measurement_path(key), measurement.text())

    def studies(self) -> list[str]:
        """Return the studies that have been evaluated, sorted."""
        return sorted(file.stem for file in (self.root / "studies").glob("*.json"))

    def study(self, name: str) -> StudyFile:
        """Return the cells of a study.

        Raises:
            InputError: it has not been evaluated, or its file is damaged.
        """
        path = self.root / "studies" / f"{name}.json"
        known = self.studies()
        if name not in known:
            way_out = f"{nearest(name, known)}. Run dvc repro evaluate"
            raise InputError(f"study '{name}' has not been evaluated", where=str(path), way_out=way_out)
        return StudyFile.read(path, _AGAIN)

    def write_study(self, study: StudyFile) -> None:
        """Keep the cells of a study."""
        write_atomic(self.root / "studies" / f"{study.study}.json", study.text())
