"""The report in MLflow: each study's page, tables and figures with its parent run, its runs tagged by their places."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.config.load import Params
from pipeline.core.errors import HificlError
from pipeline.core.files import folder_digest, write_atomic
from pipeline.core.progress import say
from pipeline.records.evaluation import Evaluations
from pipeline.report import papers, study_page, write_study
from pipeline.report.tables import Table
from pipeline.tracking.client import Tracker
from pipeline.tracking.page import REPORT
from pipeline.tracking.records import LoggedRun, plain, rounded


def log(params: Params, evaluations: Path, root: Path) -> list[str]:
    """Log every evaluated study's report that is not logged yet; return their names.

    A store that cannot be reached is said and stops nothing: the report is files.
    """
    logged = []
    try:
        reporter = Reporter(Tracker(params.tracking.uri, root))
        for study in Evaluations(evaluations).studies():
            table, html = study_page(study, params, evaluations)
            with tempfile.TemporaryDirectory() as folder:
                out = Path(folder)
                write_study(study, params, evaluations, out, for_paper=False)
                write_atomic(out / f"{study}.html", html)
                shutil.rmtree(out / "metrics")  # for DVC; a reader of MLflow has no use for them
                if reporter.log(study, out, _numbers(table), _means(table)):
                    logged.append(study)
    except HificlError as error:
        say(f"warning: the report is not in MLflow: {error}")
    return logged


def _numbers(table: Table) -> list[TableNumber]:
    numbers = []
    for row, line in enumerate(table.lines, start=1):
        for column, entry in enumerate(table.row(line), start=1):
            if entry.column.metric is None:
                place = f"{column} {papers.label('tasks', entry.column.task)}"
                for cell in entry.done:
                    if cell.run_id and cell.value is not None:
                        value = papers.convert(cell.value, cell.unit or entry.unit, entry.unit)
                        numbers.append(TableNumber(cell.run_id, f"{row:02d} {line.title}", place, value))
    return numbers


def _means(table: Table) -> dict[str, float]:
    backbones = len(table.groups()) > 1
    return {
        "/".join([*([line.backbone] if backbones else []), line.method, entry.column.task,
                  *([entry.metric] if entry.column.metric else [])]): entry.value
        for line in table.lines
        for entry in table.row(line)
        if entry.value is not None
    }  # fmt: skip


_POSITION = ("table.row", "table.column")  # tags of a trial's run
_METRIC = re.compile(r"[^\w./ :-]")  # what MLflow does not allow in a metric's name


@dataclass(frozen=True)
class TableNumber:
    """One number of a study's table at one seed.

    Attributes:
        run_id: the trial's run.
        row: the table's row, its number first, so that sorting by it gives the table.
        column: the table's column likewise.
        value: in the table's unit.
    """

    run_id: str
    row: str
    column: str
    value: float


class Reporter:
    """Logs reports to a store."""

    def __init__(self, tracker: Tracker) -> None:
        self.tracker = tracker

    def log(self, study: str, folder: Path, numbers: Sequence[TableNumber], means: Mapping[str, float]) -> bool:
        """Keep a study's report with its newest parent run, and tag the runs with their places in the table.

        A run that several studies share lies in the experiment of the study that asked for it first, and is tagged as
        that study has it. What was logged already is not logged again.

        Returns:
            Whether anything was logged: False where the study has no parent run, or its report is there already.
        """
        parents = self.tracker.search(f"tags.kind = 'sweep' and tags.study = '{plain(study)}'")
        if not parents:
            return False
        parent = max(parents, key=lambda run: (run.start_time, run.run_id))
        digest = folder_digest(folder)
        if parent.tags.get("report_digest") == digest:
            return False
        with self.tracker.talking() as client:
            client.log_artifacts(parent.run_id, str(folder), REPORT)
        self.tracker.log_scores(parent.run_id, {f"{REPORT}/{_METRIC.sub('-', name)}": means[name] for name in means})
        by_run = {number.run_id: number for number in reversed(numbers)}  # a run in two rows: the first
        for run in self.tracker.search("tags.kind = 'trial'", [parent.experiment_id]):
            self._position(run, by_run.get(run.run_id))
        self.tracker.tag(parent.run_id, {"report_digest": digest})  # last: what was cut off is logged again
        return True

    def _position(self, run: LoggedRun, number: TableNumber | None) -> None:
        if number is None:
            with self.tracker.talking() as client:
                for key in _POSITION:
                    if key in run.tags:  # of an earlier table
                        client.delete_tag(run.run_id, key)
            return
        tags = dict(zip(_POSITION, (number.row, number.column), strict=True))
        self.tracker.tag(run.run_id, {key: value for key, value in tags.items() if run.tags.get(key) != value})
        known = run.metrics.get("table_value")
        if known is None or rounded(known) != rounded(number.value):
            self.tracker.log_scores(run.run_id, {"table_value": number.value})
