"""`hificl run-trial`: train and score one recorded trial from its own JSON."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from pipeline.commands.parser import CommandLine, settable
from pipeline.core.terminal import Answer, Facts


def register(line: CommandLine) -> None:
    """Add the verb."""
    parser = line.verb("run", "run-trial", run_trial, "train and score a trial by its own config.json", answers=True)
    parser.add_argument("file", metavar="FILE", help="such as runs/KEY/config.json, from here or elsewhere")
    text = "score it as this evaluations/KEY.json was (default: as params.yaml has it)"
    parser.add_argument("--evaluation", metavar="FILE", help=text)
    parser.add_argument("--train-only", action="store_true", help="do not score it")
    settable(parser)


def run_trial(args: argparse.Namespace) -> Answer:
    """Train and score it in the current folder: weights, samples and machine are params.yaml's, the rest its own."""
    from pipeline.config.load import load
    from pipeline.sweep import recorded

    trial = recorded.read(Path(args.file), Path(args.evaluation) if args.evaluation else None)
    params, root = load(overrides=args.set), Path.cwd()
    recorded.train(trial, params, root)
    facts: dict[str, Any] = {"trial": trial.config.key, "folder": f"runs/{trial.config.key}"}
    if not args.train_only:
        key, score = recorded.score(trial, params, root)
        facts |= {"evaluation": f"evaluations/{key}.json", "metric": score.metric, "unit": score.unit}
        facts["value"] = score.value
    return Facts(facts)
