"""`hificl study`: one study from its trials to its report, beside the profile's own."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.commands.parser import CommandLine, settable, study_names
from pipeline.core.errors import InputError, nearest
from pipeline.core.terminal import Answer

if TYPE_CHECKING:
    from pipeline.config.load import Params


def register(line: CommandLine) -> None:
    """Add the verb."""
    parser = line.verb("run", "study", study, "one or more studies: train, evaluate, report", answers=True)
    study_names(parser.add_argument("study", nargs="+", metavar="S", help="`hificl studies` lists them"))
    settable(parser)


def study(args: argparse.Namespace) -> Reported:
    """Run the studies of the command line in the current folder."""
    from pipeline.config.load import load

    return run(args.study, load(overrides=args.set), Path.cwd())


@dataclass(frozen=True)
class Reported(Answer):
    """Where the reports of studies are; what they say was said on standard error when they were made."""

    page: str
    studies: dict[str, list[str]]

    def record(self) -> dict[str, Any]:
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
    from pipeline import report
    from pipeline.report import tracked
    from pipeline.sweep.evaluate import evaluate
    from pipeline.sweep.train import sweep

    for name in studies:
        if name not in params.studies:
            raise InputError(f"unknown study '{name}'", way_out=nearest(name, params.studies))
    _draw_samples(params, studies, root)
    sweep(params, studies, root)
    evaluate(params, studies, root)
    evaluations, out = root / "evaluations", root / "reports"
    for name in studies:
        report.write_study(name, params, evaluations, out)
    index = report.write_index(params, evaluations, out)
    tracked.log(params, evaluations, root)
    index.say(studies)
    files = {name: [f"{out / name}.{end}" for end in ("md", "csv")] for name in studies}
    return Reported(str(index.page), files)


def _draw_samples(params: Params, studies: list[str], root: Path) -> None:
    """Draw the samples that are not there yet: on a fresh clone a study is one command too."""
    from pipeline.commands.workspace_folder import dvc
    from pipeline.plan.inputs import places
    from pipeline.plan.space import needed
    from pipeline.sweep.draw import draw_task

    where = places(root)

    def absent() -> list[str]:
        return [task for task in needed(params, studies)[1] if not where.manifest(task).is_file()]

    if absent() and (root / ".dvc").is_dir():
        dvc(root, "repro", "subsample", shown=True)  # what the profile's own studies need
    for task in absent():
        draw_task(params, task, root)
