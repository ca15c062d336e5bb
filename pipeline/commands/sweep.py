"""`hificl sweep`: train the trials that are open, here or as a Ray job; `hificl run-trial`: one by its own JSON."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.commands.parser import CommandLine, settable, study_names
from pipeline.core.terminal import Answer, Fields

if TYPE_CHECKING:
    from pipeline.core.plain_yaml import Json


def register(line: CommandLine) -> None:
    """Add the verbs."""
    parser = line.verb("run", "sweep", _sweep, "train the trials that are open; safe to kill and to run again")
    how = parser.add_mutually_exclusive_group()
    how.add_argument(
        "--submit", action="store_true", help="as a job of the Ray cluster whose head this is, and follow it"
    )
    how.add_argument("--attach", action="store_true", help="follow the sweep that was submitted from this folder")
    study_names(parser.add_argument("--study", action="append", metavar="S", help="a study (default: the profile's)"))
    settable(parser)

    parser = line.verb("run", "run-trial", _run_trial, "train and score a trial by its own config.json", answers=True)
    parser.add_argument("file", metavar="FILE", help="such as runs/KEY/config.json, from here or elsewhere")
    text = "score it as this evaluations/KEY.json was (default: as params.yaml has it)"
    parser.add_argument("--evaluation", metavar="FILE", help=text)
    parser.add_argument("--train-only", action="store_true", help="do not score it")
    settable(parser)


def _sweep(args: argparse.Namespace) -> None:
    """Train the open trials, submit a job that does, or follow one."""
    from pipeline.config.load import load

    params = load(overrides=args.set)  # what is wrong with it is said here, not in a job's log
    if args.attach or args.submit:
        from pipeline.pool import ray_job

        chosen = [*_repeated("--study", args.study or []), *_repeated("--set", args.set)]
        sys.exit(ray_job.attach_to_sweep() if args.attach else ray_job.submit(chosen))
    from pipeline.sweep.train import sweep

    sweep(params, args.study or params.run.studies)


def _repeated(flag: str, values: list[str]) -> list[str]:
    return [word for value in values for word in (flag, value)]


def _run_trial(args: argparse.Namespace) -> Answer:
    """Train and score it in the current folder: weights, samples and machine are params.yaml's, the rest its own."""
    from pipeline.config.load import load
    from pipeline.sweep import recorded

    trial = recorded.read_recorded(Path(args.file), Path(args.evaluation) if args.evaluation else None)
    params, root = load(overrides=args.set), Path.cwd()
    recorded.train_recorded(trial, params, root)
    fields: Json = {"trial": trial.config.key, "folder": f"runs/{trial.config.key}"}
    if not args.train_only:
        key, score = recorded.score_recorded(trial, params, root)
        fields |= {"evaluation": f"evaluations/{key}.json", "metric": score.metric, "unit": score.unit}
        fields["value"] = score.value
    return Fields(fields)
