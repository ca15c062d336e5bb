"""The files that stage `evaluate` writes, read and checked: a study's cells, and a trial's predictions."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from pipeline.errors import InputError, nearest

_KEY = re.compile(r"[A-Za-z0-9_.-]+")  # what may become a file's name
_RUN = "Run dvc repro evaluate again"


class _File(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class Candidate(_File):
    """One trial that was tried for a cell, with its score on the selection split."""

    trial: str
    searched: dict[str, Any] = {}
    selection_score: float | None = None


class Cell(_File):
    """One number of a study at one seed."""

    row: str
    label: str
    method: str
    backbone: str
    paper_backbone: str
    task: str
    paper_task: str
    vary: dict[str, Any] = {}
    seed: int = 0
    searched: dict[str, Any] = {}
    candidates: list[Candidate] = []
    trial: str | None = None
    evaluation: str | None = None
    evaluation_digest: str | None = None
    measure: str | None = None
    measurement: str | None = None
    measurement_digest: str | None = None
    metric: str | None = None
    unit: str | None = None
    value: float | None = None
    metrics: dict[str, float | None] = {}
    units: dict[str, str] = {}
    run_id: str | None = None
    experiment_id: str | None = None
    status: Literal["done", "missing", "failed"] = "done"
    error: str | None = None
    trainable_parameters: int | None = None
    train_seconds: float | None = None
    train_flops: float | None = None
    peak_memory_bytes: float | None = None
    chosen_epoch: int | None = None
    epochs: list[dict[str, float | None]] = []
    num_samples: int | None = None


class StudyFile(_File):
    """All cells of a study."""

    study: str
    title: str
    profile: str = ""
    selection: str = "selection"
    protocol: str | None = None
    provenance: dict[str, Any] = {}
    cells: list[Cell]


class Prediction(_File):
    """One answer; `question`, `references` and `image` are shown in a gallery where they are given."""

    sample_id: int | str
    prediction: str = ""
    score: float | None = None
    question: str | None = None
    references: list[str] = []
    image: str | None = None
    hallucinated: list[str] = []  # words of a caption that name what its image does not show (CHAIR)


class Evaluation(_File):
    """One trial, scored."""

    trial: str
    metric: str
    unit: str
    value: float | None = None
    predictions: list[Prediction] = []


T = TypeVar("T", bound=_File)


def read_study(study: str, evaluations: Path) -> StudyFile:
    """Read `studies/<study>.json`.

    Raises:
        InputError: there is no such file, or it breaks the schema.
    """
    known = [file.stem for file in (evaluations / "studies").glob("*.json")]
    if study not in known:
        where = str(evaluations / "studies" / f"{study}.json")
        raise InputError(
            f"study '{study}' has not been evaluated",
            where=where,
            way_out=f"{nearest(study, known)}. Run dvc repro evaluate",
        )
    return _read(StudyFile, evaluations / "studies" / f"{study}.json")


def read_evaluation(key: str, evaluations: Path) -> Evaluation | None:
    """Read `<key>.json`; None where it is not there (the cell's number stands without it)."""
    file = evaluations / f"{key}.json"
    return _read(Evaluation, file) if _KEY.fullmatch(key) and file.is_file() else None


def study_names(evaluations: Path) -> list[str]:
    """Return the studies that have been evaluated, sorted."""
    return sorted(file.stem for file in (evaluations / "studies").glob("*.json"))


def _read(model: type[T], file: Path) -> T:
    try:
        return model.model_validate(json.loads(file.read_text(encoding="utf-8")))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"not readable as JSON: {error}", where=str(file), way_out=_RUN) from None
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise InputError(
            f"{field}: {first['msg']}, got {first.get('input')!r}", where=str(file), way_out=_RUN
        ) from None
