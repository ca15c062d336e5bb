"""`hificl trace`: from a number of a report to its run, adapter, data and commit."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.commands.parser import CommandLine, study_names
from pipeline.core.errors import InputError

if TYPE_CHECKING:
    from pipeline.core.terminal import Answer


def register(line: CommandLine) -> None:
    """Add the verb."""
    parser = line.verb("look", "trace", trace, "from a number to its run, adapter, data and commit", answers=True)
    shown = "such as reports/hificl-table1.csv:1:value"
    parser.add_argument("number", nargs="?", metavar="FILE:ROW:COLUMN", help=shown)
    study_names(parser.add_argument("--study", metavar="S"))
    parser.add_argument("--cell", metavar="ROW:COLUMN", help="such as hificl:coco")
    parser.add_argument("--all", action="store_true", help="every number of every report, or of the --study's")


def trace(args: argparse.Namespace) -> Answer:
    """Return what one number, or every number, was made from.

    Raises:
        InputError: not exactly one way to name what is traced, or no such number.
    """
    from pipeline.config.load import load
    from pipeline.lineage.place import locate, locate_cell
    from pipeline.lineage.trace import trace_number, trace_reports

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
