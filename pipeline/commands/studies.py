"""`hificl studies`: how far every study is; `hificl study`, `sweep`, `run-trial`: what runs one, or a part of it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.commands.parser import CommandLine, settable, study_names
from pipeline.core.errors import HificlError, InputError, nearest
from pipeline.core.terminal import GOOD, Answer, Fields, table

if TYPE_CHECKING:
    from rich.console import RenderableType

    from pipeline.config.load import Params
    from pipeline.core.plain_yaml import Json
    from pipeline.plan.plan import Inputs


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
    settable(parser)


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
    from pipeline.plan.plan import Inputs, places

    inputs = Inputs(params, places())
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

    return run(args.study, load(overrides=args.set), Path.cwd())


@dataclass(frozen=True)
class Reported(Answer):
    """Where the reports of studies are; what they say was said on standard error when they were made."""

    page: str
    studies: dict[str, list[str]]

    def record(self) -> Json:
        """Return the page, and the files by study."""
        return asdict(self)

    def shown(self) -> Iterator[str]:
        """Give the files by study."""
        yield from ("tables: " + ", ".join(files) for files in self.studies.values())


def run(studies: list[str], params: Params, root: Path) -> Reported:
    """Train, evaluate and report studies; what is done already is not done again.

    The result tables, and what became of the claims about these studies, are said at the end.

    Returns:
        The report's files by study, and the page.

    Raises:
        InputError: unknown study, or inputs that are not in order.
        WorkError: some trials failed; the others are done.
    """
    from pipeline.sweep.evaluate import evaluate
    from pipeline.sweep.train import sweep

    for name in studies:
        if name not in params.studies:
            raise InputError(f"unknown study '{name}'", way_out=nearest(name, params.studies))
    draw_samples(params, studies, root)
    sweep(params, studies, root)
    evaluate(params, studies, root)
    return report_on(studies, params, root)


def report_on(studies: list[str], params: Params, root: Path) -> Reported:
    """Write the reports of studies that are evaluated, and say what they came out as."""
    from pipeline import report
    from pipeline.report import mlflow_report

    evaluations, out = root / "evaluations", root / "reports"
    for name in studies:
        report.write_study(name, params, evaluations, out)
    index = report.write_index(params, evaluations, out)
    mlflow_report.log(params, evaluations, root)
    index.say(studies)
    files = {name: [f"{out / name}.{end}" for end in ("md", "csv")] for name in studies}
    return Reported(str(index.page), files)


def draw_samples(params: Params, studies: list[str], root: Path) -> None:
    """Draw the samples that are not there yet: on a fresh clone a study is one command too."""
    from pipeline.commands.workspace import dvc
    from pipeline.plan.plan import places
    from pipeline.plan.space import needed
    from pipeline.sweep.draw import draw_task

    folders = places(root)

    def absent() -> list[str]:
        return [task for task in needed(params, studies)[1] if not folders.manifest(task).is_file()]

    if absent() and (root / ".dvc").is_dir():
        dvc(root, "repro", "subsample", shown=True)  # what the profile's own studies need
    for task in absent():
        draw_task(params, task, root)


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
