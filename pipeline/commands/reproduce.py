"""`hificl reproduce`: train and score a run again by its own record."""

from __future__ import annotations

import argparse
from pathlib import Path

from pipeline.commands.parser import CommandLine
from pipeline.core.terminal import Answer, Facts


def register(line: CommandLine) -> None:
    """Add the verb."""
    parser = line.verb("check", "reproduce", reproduce, "train and score a run again by its own record", answers=True)
    parser.add_argument("run_id", metavar="RUN_ID")
    text = "what the numbers may differ by (default: 0 on one CPU process)"
    parser.add_argument("--tolerance", type=float, help=text)
    parser.add_argument("--here", action="store_true", help="run the code as it is now, not the run's commit")
    parser.add_argument("--keep", metavar="FOLDER", help="keep the private store")


def reproduce(args: argparse.Namespace) -> Answer:
    """Return both numbers and how they differ; more than the tolerance is a problem."""
    from pipeline.config.load import load
    from pipeline.lineage.reproduce import reproduce_run
    from pipeline.pool.signals import as_interrupt

    with as_interrupt():  # so that the worktree is removed
        reproduction = reproduce_run(
            args.run_id, load(), Path.cwd(), tolerance=args.tolerance, here=args.here,
            keep=Path(args.keep) if args.keep else None,
        )  # fmt: skip
    return Facts(reproduction.record(), reproduction.problem)
