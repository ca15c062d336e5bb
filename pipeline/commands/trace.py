"""`hificl trace`: from a number to what it was made from; `hificl reproduce`: a run again by its own record."""

from __future__ import annotations

import argparse
from pathlib import Path

from pipeline.commands.parser import CommandLine, study_names
from pipeline.core.errors import InputError
from pipeline.core.terminal import Answer, Fields


def register(line: CommandLine) -> None:
    """Add the verbs."""
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


def _trace(args: argparse.Namespace) -> Answer:
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
