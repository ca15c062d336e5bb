"""The folder `evaluations/`: the one place that reads and writes what stage `evaluate` keeps.

evaluations/<key>.json            one scored trial: configuration, score, predictions with ids
evaluations/measures/<key>.json   one measured trial: configuration, measure and its settings, numbers
evaluations/studies/<study>.json  the cells of a study, each with its chosen trial and its candidates

A file is written whole, so one that is there is complete.
"""

from __future__ import annotations

import re
from pathlib import Path

from pipeline.core.errors import InputError, nearest
from pipeline.core.files import write_atomic
from pipeline.records.evaluation import Evaluation, Measurement, StudyFile

_KEY = re.compile(r"[A-Za-z0-9_.-]+")  # what may become a file's name
_AGAIN = "Remove the file and run dvc repro evaluate again"


class Evaluations:
    """The records of evaluations.

    Args:
        root: the folder.
    """

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
