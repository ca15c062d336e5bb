"""Studies from their samples to their reports, in one folder: what is done already is not done again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from pipeline import report
from pipeline.config.load import Params
from pipeline.core.errors import InputError, nearest
from pipeline.core.plain_yaml import Json
from pipeline.core.terminal import Answer
from pipeline.plan.plan import places
from pipeline.plan.space import needed
from pipeline.report import mlflow_report
from pipeline.sweep.draw import draw_task
from pipeline.sweep.evaluate import evaluate
from pipeline.sweep.train import sweep
from pipeline.workspace import dvc


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
    for name in studies:
        if name not in params.studies:
            raise InputError(f"unknown study '{name}'", way_out=nearest(name, params.studies))
    draw_samples(params, studies, root)
    sweep(params, studies, root)
    evaluate(params, studies, root)
    return report_on(studies, params, root)


def report_on(studies: list[str], params: Params, root: Path) -> Reported:
    """Write the reports of studies that are evaluated, and say what they came out as."""
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
    folders = places(root)

    def absent() -> list[str]:
        return [task for task in needed(params, studies)[1] if not folders.manifest(task).is_file()]

    if absent() and (root / ".dvc").is_dir():
        dvc(root, "repro", "subsample", shown=True)  # what the profile's own studies need
    for task in absent():
        draw_task(params, task, root)
