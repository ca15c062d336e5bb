"""`hificl where`: where a folder's report and its MLflow store are."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from pipeline.commands.parser import CommandLine
from pipeline.core.terminal import Answer


def register(line: CommandLine) -> None:
    """Add the verb."""
    line.verb("look", "where", where, "where the report and the MLflow store of this folder are", answers=True)


@dataclass(frozen=True)
class Whereabouts(Answer):
    """Where a folder's results are; None for what is not there yet."""

    report: str | None
    tables: str | None
    runs: str | None

    def record(self) -> dict[str, str | None]:
        """Return the paths."""
        return asdict(self)

    def shown(self) -> Iterator[str]:
        """Give a line a place, and how to look at it."""
        yield f"report  {self.report or 'none yet: dvc repro'}"
        yield f"tables  {f'{self.tables}/*.md and *.csv' if self.tables else 'none yet'}"
        yield f"runs    {f'{self.runs}, in a browser by `hificl ui`' if self.runs else 'none yet'}"


def where(_: argparse.Namespace) -> Whereabouts:
    """Return where the report, its tables and the MLflow store of the current folder are."""
    folder = Path.cwd()
    places = (folder / "reports/index.html", folder / "reports", folder / "mlflow.db")
    return Whereabouts(*(str(path) if path.exists() else None for path in places))
