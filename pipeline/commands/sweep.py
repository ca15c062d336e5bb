"""`hificl sweep`: train the trials that are open, here or as a job of a Ray cluster."""

from __future__ import annotations

import argparse
import sys

from pipeline.commands.parser import CommandLine, settable, study_names


def register(line: CommandLine) -> None:
    """Add the verb."""
    parser = line.verb("run", "sweep", sweep, "train the trials that are open; safe to kill and to run again")
    how = parser.add_mutually_exclusive_group()
    how.add_argument(
        "--submit", action="store_true", help="as a job of the Ray cluster whose head this is, and follow it"
    )
    how.add_argument("--attach", action="store_true", help="follow the sweep that was submitted from this folder")
    study_names(parser.add_argument("--study", action="append", metavar="S", help="a study (default: the profile's)"))
    settable(parser)


def sweep(args: argparse.Namespace) -> None:
    """Train the open trials, submit a job that does, or follow one."""
    from pipeline.config.load import load

    params = load(overrides=args.set)  # what is wrong with it is said here, not in a job's log
    if args.attach or args.submit:
        from pipeline.pool import job

        chosen = [*_repeated("--study", args.study or []), *_repeated("--set", args.set)]
        sys.exit(job.attach() if args.attach else job.submit(chosen))
    from pipeline.sweep.train import sweep as train

    train(params, args.study or params.run.studies)


def _repeated(flag: str, values: list[str]) -> list[str]:
    return [word for value in values for word in (flag, value)]
