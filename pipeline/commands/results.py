"""`hificl results`, `hificl gallery`, `hificl where`: tables on the terminal, a page of figures, where both lie."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.commands.parser import CommandLine, study_names
from pipeline.core.terminal import Answer

if TYPE_CHECKING:
    from pipeline.core.plain_yaml import Json
    from pipeline.report.results import StudyResults


def register(line: CommandLine) -> None:
    """Add the verbs."""
    parser = line.verb("look", "results", _results, "what studies came out as: the report's tables", answers=True)
    text = "a study that is evaluated (default: the profile's)"
    study_names(parser.add_argument("study", nargs="*", metavar="S", help=text))

    line.verb("look", "where", _where, "where the report and the MLflow store of this folder are", answers=True)

    parser = line.verb("look", "gallery", _gallery, "a Markdown page of the report's figures")
    parser.add_argument("--out", default="docs/gallery.md", metavar="FILE")
    text = "also write tables between the marks of a document"
    parser.add_argument("--into", action="append", default=[], metavar="FILE", help=text)


def _results(args: argparse.Namespace) -> StudyResults:
    """Return the tables of evaluated studies."""
    from pipeline import report
    from pipeline.config.load import load
    from pipeline.report.results import StudyResults

    params, evaluations = load(), Path("evaluations")
    return StudyResults([report.load_table(name, params, evaluations) for name in args.study or params.run.studies])


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


def _where(_: argparse.Namespace) -> Whereabouts:
    """Return where the report, its tables and the MLflow store of the current folder are."""
    folder = Path.cwd()
    places = (folder / "reports/index.html", folder / "reports", folder / "mlflow.db")
    return Whereabouts(*(str(path) if path.exists() else None for path in places))


def _gallery(args: argparse.Namespace) -> Json:
    """Write the page and return what is on it."""
    from pipeline.config.load import load
    from pipeline.report import gallery as documents
    from pipeline.report.gallery import write_gallery

    params, evaluations = load(), Path("evaluations")
    filled = {path: documents.write_into(Path(path), params, evaluations) for path in args.into}
    return {"page": args.out, "studies": [*write_gallery(params, evaluations, Path(args.out))], "filled": {**filled}}
