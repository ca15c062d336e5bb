"""`hificl results`: the report's tables on the terminal."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.commands.parser import CommandLine, study_names

if TYPE_CHECKING:
    from pipeline.report.results import StudyResults


def register(line: CommandLine) -> None:
    """Add the verb."""
    parser = line.verb("look", "results", results, "what studies came out as: the report's tables", answers=True)
    text = "a study that is evaluated (default: the profile's)"
    study_names(parser.add_argument("study", nargs="*", metavar="S", help=text))


def results(args: argparse.Namespace) -> StudyResults:
    """Return the tables of evaluated studies."""
    from pipeline import report
    from pipeline.config.load import load
    from pipeline.report.results import StudyResults

    params, evaluations = load(), Path("evaluations")
    return StudyResults([report.load_table(name, params, evaluations) for name in args.study or params.run.studies])
