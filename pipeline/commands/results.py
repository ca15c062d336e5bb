"""Results and what they were made from: `hificl results`, `where`, `gallery`, `trace`, `reproduce`; MLflow's servers.

`hificl ui` shows the MLflow page over a folder's store; `hificl tracking-server` serves one with a password, for a
cluster.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.commands.parser import CommandLine, study_names
from pipeline.core.errors import InputError
from pipeline.core.terminal import Answer, Fields

if TYPE_CHECKING:
    from pipeline.core.plain_yaml import Json
    from pipeline.report.writers import StudyResults


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

    parser = line.verb("look", "trace", _trace, "from a number to its run, adapter, data and commit", answers=True)
    shown = "such as reports/hificl-table1.csv:1:value"
    parser.add_argument("number", nargs="?", metavar="FILE:ROW:COLUMN", help=shown)
    study_names(parser.add_argument("--study", metavar="S"))
    parser.add_argument("--cell", metavar="ROW:COLUMN", help="such as hificl:coco")
    parser.add_argument("--all", action="store_true", help="every number of every report, or of the --study's")

    parser = line.verb("check", "reproduce", _reproduce, "train and score a run again by its own record", answers=True)
    parser.add_argument("run_id", metavar="RUN_ID")
    text = "what the numbers may differ by (default: 0 on one CPU process)"
    parser.add_argument("--tolerance", type=float, help=text)
    parser.add_argument("--here", action="store_true", help="run the code as it is now, not the run's commit")
    parser.add_argument("--keep", metavar="FOLDER", help="keep the private store")

    parser = line.verb("look", "ui", _ui, "the MLflow UI over this folder's store, on loopback")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=5000)

    parser = line.verb("cluster", "tracking-server", _serve, "an MLflow server with a password, for its head")
    parser.add_argument("--folder", default="~/.hificl/tracking", help="its secrets, artifacts and log")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=5000)
    text = "postgresql+psycopg://USER@HOST/NAME (default: SQLite in the folder)"
    parser.add_argument("--database", metavar="URI", help=text)
    parser.add_argument("--artifacts", metavar="PLACE", help="a folder or s3://... (default: in the folder)")
    parser.add_argument("--detach", action="store_true", help="leave it running, and return when it answers")


def _results(args: argparse.Namespace) -> StudyResults:
    """Return the tables of evaluated studies."""
    from pipeline import report
    from pipeline.config.load import load
    from pipeline.report.writers import StudyResults

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
    from pipeline.report.gallery import write_gallery, write_into

    params, evaluations = load(), Path("evaluations")
    filled = {path: write_into(Path(path), params, evaluations) for path in args.into}
    return {"page": args.out, "studies": [*write_gallery(params, evaluations, Path(args.out))], "filled": {**filled}}


def _trace(args: argparse.Namespace) -> Answer:
    """Return what one number, or every number, was made from.

    Raises:
        InputError: not exactly one way to name what is traced, or no such number.
    """
    from pipeline.config.load import load
    from pipeline.lineage.trace import locate, locate_cell, trace_number, trace_reports

    if args.all:
        if args.number is not None or args.cell is not None:
            raise InputError("--all takes a --study at most", where="trace")
        return trace_reports([args.study] if args.study else [], load(), Path.cwd())
    if (args.number is None) == (args.study is None) or (args.study is None) != (args.cell is None):
        raise InputError("give FILE:ROW:COLUMN, or --study S with --cell ROW:COLUMN", where="trace")
    params, evaluations = load(), Path("evaluations")
    place = (
        locate_cell(args.study, args.cell, params, evaluations)
        if args.study
        else locate(args.number, params, evaluations)
    )
    return trace_number(place, params, Path.cwd())


def _reproduce(args: argparse.Namespace) -> Answer:
    """Return both numbers and how they differ; more than the tolerance is a problem."""
    from pipeline.config.load import load
    from pipeline.lineage.reproduce import reproduce_run
    from pipeline.pool.processes import as_interrupt

    with as_interrupt():  # so that the worktree is removed
        reproduction = reproduce_run(
            args.run_id, load(), Path.cwd(), tolerance=args.tolerance, here=args.here,
            keep=Path(args.keep) if args.keep else None,
        )  # fmt: skip
    return Fields(reproduction.record(), reproduction.problem)


def _ui(args: argparse.Namespace) -> None:
    """Serve until interrupted."""
    from pipeline.config.load import PARAMS, load
    from pipeline.tracking.server import serve_page

    uri = load().tracking.uri if Path(PARAMS).is_file() else None
    serve_page(Path.cwd(), uri, host=args.host, port=args.port)


def _serve(args: argparse.Namespace) -> None:
    """Start the server."""
    from pipeline.tracking.server import start

    start(
        Path(args.folder), host=args.host, port=args.port, database=args.database, artifacts=args.artifacts,
        detach=args.detach,
    )  # fmt: skip
