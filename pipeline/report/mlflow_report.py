"""The report in MLflow: each study's page, tables and figures with its parent run, its runs tagged by their places."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from pipeline.config.load import Params
from pipeline.core.errors import HificlError
from pipeline.core.files import write_atomic
from pipeline.core.progress import say
from pipeline.records.evaluation import Evaluations
from pipeline.report import papers, study_page, write_study
from pipeline.report.tables import Table
from pipeline.tracking.client import Tracker
from pipeline.tracking.reports import Reporter, TableNumber


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
                write_study(study, params, evaluations, out)
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
