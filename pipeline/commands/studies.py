"""`hificl studies`: how far every study is; `hificl study`, `sweep`, `run-trial`, `adapt`: what runs one, or a part."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.commands.parser import CommandLine, flagged, settable, study_names
from pipeline.core.errors import HificlError
from pipeline.core.terminal import GOOD, Answer, Fields, table

if TYPE_CHECKING:
    from rich.console import RenderableType

    from pipeline.config.load import Params
    from pipeline.core.plain_yaml import Json
    from pipeline.plan.plan import Inputs
    from pipeline.workspace import Reported
    from pipeline.workspace.adapt import Adapted


def register(line: CommandLine) -> None:
    """Add the verbs."""
    settable(line.verb("look", "studies", _studies, "every study, its trials done and open", answers=True))

    parser = line.verb("run", "study", _study, "one or more studies: train, evaluate, report", answers=True)
    study_names(parser.add_argument("study", nargs="+", metavar="S", help="`hificl studies` lists them"))
    settable(parser)

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
    parser.add_argument("--stop-after", type=int, metavar="N", help="stop it after epoch N, as it was stopped")
    settable(parser)
    _register_adapt(line)


def _register_adapt(line: CommandLine) -> None:
    text = "your own data and a backbone's name to a table and an adapter"
    parser = line.verb("run", "adapt", _adapt, text, answers=True)
    parser.add_argument("--data", required=True, metavar="FILE", help="JSON lines, JSON, CSV, Parquet, or a folder")
    parser.add_argument("--backbone", required=True, metavar="NAME")
    parser.add_argument("--methods", default="hificl,lora,mimic", metavar="M,M", help="(default: hificl,lora,mimic)")
    parser.add_argument("--minutes", type=float, default=10.0, metavar="N", help="about how long it may take (10)")
    parser.add_argument("--out", metavar="DIR", help="the workspace that is made (default: work/<name of the file>)")
    parser.add_argument("--images", metavar="DIR", help="where image paths begin (default: beside the file)")
    parser.add_argument("--score", help="exact, vqa, cider, choice, contains or number (default: guessed)")
    parser.add_argument("--prompt", metavar="TEXT", help="such as 'Image: {image} Question: {question} Answer:'")
    parser.add_argument("--split", metavar="COLUMN", help="which says a row's split (default: guessed, or drawn)")
    parser.add_argument("--field", action="append", default=[], metavar="NAME=COLUMN", help="such as question=asked")
    parser.add_argument("--bad-rows", choices=["refuse", "leave-out"], default="refuse", help="(default: refuse)")
    parser.add_argument("--seed", type=int, default=0)


def _studies(args: argparse.Namespace) -> Overview:
    """Look at the current folder's."""
    from pipeline.config.load import load

    return overview(load(overrides=args.set))


@dataclass(frozen=True)
class StudyState:
    """A study, and how many of its trials are done; `not_ready` says why they cannot be told.

    Attributes:
        title: what it is.
        paper: its table or figure (`hificl.table1_main`).
        in_profile: whether `dvc repro` runs it.
        trials: how many it has; None where it is not ready.
        done: of these.
        open: likewise.
        not_ready: why this profile cannot run it, or cannot yet.
    """

    title: str
    paper: str | None
    in_profile: bool
    trials: int | None = None
    done: int | None = None
    open: int | None = None
    not_ready: str | None = None


@dataclass(frozen=True)
class Overview(Answer):
    """The studies by name, under a profile."""

    profile: str
    studies: dict[str, StudyState]

    def record(self) -> Json:
        """Return a study's fields by its name, those that it has."""
        always = ("title", "paper")
        return {
            name: {key: value for key, value in asdict(state).items() if value is not None or key in always}
            for name, state in self.studies.items()
        }

    def shown(self) -> Iterator[RenderableType]:
        """Give a row a study, those of the profile marked, and below why others have no trials here."""
        rows = table("study", "what it is", "done", "trials", right=("done", "trials"))
        for name, state in self.studies.items():
            whole = state.trials is not None and state.done == state.trials
            numbers = ["-" if count is None else str(count) for count in (state.done, state.trials)]
            mark = "*" if state.in_profile else " "
            rows.add_row(f"{mark} {name}", state.title, *numbers, style=GOOD if whole else "")
        yield rows
        yield f"\n* run by `dvc repro` under profile {self.profile}; any other by `hificl study NAME`"
        reasons: dict[str, list[str]] = {}
        for name, state in self.studies.items():
            if state.not_ready:
                reasons.setdefault(state.not_ready, []).append(name)
        for reason, names in reasons.items():
            yield f"- {', '.join(names) if len(names) < len(self.studies) else 'every study'}: {reason}"


def overview(params: Params) -> Overview:
    """Return how far the trials of every study are, under the current profile."""
    from pipeline.adapters.options import counted_only
    from pipeline.plan.plan import Inputs, places

    inputs = Inputs(params, places())
    with counted_only():
        return Overview(params.profile, {name: _state(name, inputs) for name in params.studies})


def _state(name: str, inputs: Inputs) -> StudyState:
    from pipeline.plan.plan import make_plan
    from pipeline.plan.space import cells
    from pipeline.records.store import TrialStore

    params = inputs.params
    study, in_profile = params.studies[name], name in params.run.studies
    try:
        plan = make_plan(params, cells(params, name, inputs.digests([name])), inputs.where)
        store = TrialStore(inputs.where.runs)
        done = sum(store.finished(key) for key in plan.trials)
    except HificlError as error:
        return StudyState(study.title, study.paper, in_profile, not_ready=str(error))
    return StudyState(study.title, study.paper, in_profile, len(plan.trials), done, len(plan.trials) - done)


def _study(args: argparse.Namespace) -> Reported:
    """Run the studies of the command line in the current folder."""
    from pipeline.config.load import load
    from pipeline.workspace import run

    return run(args.study, load(overrides=args.set), Path.cwd())


def _sweep(args: argparse.Namespace) -> None:
    """Train the open trials, submit a job that does, or follow one."""
    from pipeline.config.load import load

    params = load(overrides=args.set)  # what is wrong with it is said here, not in a job's log
    if args.attach or args.submit:
        from pipeline.pool import cluster

        chosen = [*flagged("--study", args.study or []), *flagged("--set", args.set)]
        sys.exit(cluster.attach_to_sweep() if args.attach else cluster.submit(chosen))
    from pipeline.pool.supervisor import Drivers

    with Drivers(params.sweep) as drivers:  # Ray starts while torch and MLflow are imported
        from pipeline.sweep.train import sweep

        sweep(params, args.study or params.run.studies, drivers)


def _run_trial(args: argparse.Namespace) -> Answer:
    """Train and score it in the current folder: weights, samples and machine are params.yaml's, the rest its own."""
    from pipeline.config.load import load
    from pipeline.pool.supervisor import Drivers
    from pipeline.sweep import recorded

    trial = recorded.read_recorded(Path(args.file), Path(args.evaluation) if args.evaluation else None)
    params, root = load(overrides=args.set), Path.cwd()
    fields: Json = {"trial": trial.config.key, "folder": f"runs/{trial.config.key}"}
    with Drivers() as drivers:
        recorded.train_recorded(trial, params, drivers, root, stop_after=args.stop_after)
        scored = None if args.train_only else recorded.score_recorded(trial, params, drivers, root)
    if scored is not None:
        key, score = scored
        fields |= {"evaluation": f"evaluations/{key}.json", "metric": score.metric, "unit": score.unit}
        fields["value"] = score.value
    return Fields(fields)


def _adapt(args: argparse.Namespace) -> Adapted:
    """Adapt as the command line says."""
    from pipeline.workspace.adapt import Asked, adapt, task_name

    fields = dict(field.partition("=")[::2] for field in args.field)
    data, images = Path(args.data).resolve(), Path(args.images).resolve() if args.images else None
    given = {
        "images": str(images) if images else None, "fields": fields, "score": args.score, "prompt": args.prompt,
        "split": args.split, "bad_rows": args.bad_rows,
    }  # fmt: skip
    settings = {name: value for name, value in given.items() if value}
    backbone = (
        f"folder:{Path(rest).resolve()}" if (rest := args.backbone.removeprefix("folder:")) != args.backbone else rest
    )
    methods = tuple(filter(None, map(str.strip, args.methods.split(","))))
    asked = Asked(str(data), backbone, methods, args.minutes, args.seed, settings)
    out = Path(args.out) if args.out else Path("work") / task_name(data)
    return adapt(asked, out)
