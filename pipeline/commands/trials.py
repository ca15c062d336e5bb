"""`hificl trials`: what would train and be scored, with every setting and where it comes from."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from pipeline.commands.parser import CommandLine, profile_name, settable, study_names

if TYPE_CHECKING:
    from pipeline.plan.trials import Trials


def register(line: CommandLine) -> None:
    """Add the verb."""
    parser = line.verb("look", "trials", trials, "what would train: every setting, and where it is from", answers=True)
    study_names(parser.add_argument("--study", action="append", metavar="S", help="a study (default: the profile's)"))
    profile_name(parser.add_argument("--profile", metavar="P", help="a profile (default: params.yaml's)"))
    settable(parser)


def trials(args: argparse.Namespace) -> Trials:
    """Return the trials of some studies."""
    from pipeline.config import load
    from pipeline.plan.trials import Trials, trial_rows

    params = load(overrides=args.set, profile=args.profile)
    return Trials(trial_rows(params, args.study or params.run.studies))
