"""Which number is meant: FILE:ROW:COLUMN, or a study with ROW:COLUMN, to an entry of the study's table."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

from pipeline import report
from pipeline.config.load import Params
from pipeline.core.errors import InputError, nearest
from pipeline.report import papers
from pipeline.report.tables import Table, TableEntry
from pipeline.report.writers import number

NUMBERS = ("value", "std", "seeds", "run_ids")  # the CSV's columns that trials stand behind
_FORM = "Write FILE:ROW:COLUMN, such as reports/hificl-table1.csv:1:value or reports/hificl-table1.csv:hificl:coco"


@dataclass(frozen=True)
class Place:
    """One number of a report.

    Attributes:
        study: the study's name.
        table: the study, laid out from the evaluation files.
        entry: the number.
        file: the report file that was named, or None.
        printed: what stands in the CSV beside the entry; None where there is no CSV row.
    """

    study: str
    table: Table
    entry: TableEntry
    file: Path | None
    printed: str | None


def locate(text: str, params: Params, evaluations: Path) -> Place:
    """Return the number that `FILE:ROW:COLUMN` names.

    ROW is a row's number in the CSV (the first below the header is 1) or a row's name (`hificl`,
    `mini-idefics2/hificl rank=8`); COLUMN is `value` or a task or metric.

    Raises:
        InputError: no such file, row or column, or more than one number fits.
    """
    parts = text.rsplit(":", 2)
    if len(parts) != 3 or not all(parts):
        raise InputError(f"'{text}' names no number", way_out=_FORM)
    file, row, column = Path(parts[0]), parts[1], parts[2]
    if not file.is_file():
        raise InputError("no such file", where=str(file), way_out="Run dvc repro first. " + _FORM)
    if file.suffix not in (".csv", ".md"):
        raise InputError("no table of one study", where=str(file), way_out="Give the study's CSV or Markdown. " + _FORM)
    table = report.load_table(file.stem, params, evaluations)
    rows = _csv_rows(file.with_suffix(".csv"))
    if row.isdigit():
        if not rows or not 1 <= int(row) <= len(rows):
            raise InputError(f"no row {row}; there are {len(rows)}", where=str(file.with_suffix(".csv")), way_out=_FORM)
        entry = _of_csv(table, rows[int(row) - 1], column, str(file))
    else:
        entry = _named(table, row, column, str(file))
    return Place(file.stem, table, entry, file, _printed(rows, entry))


def locate_cell(study: str, cell: str, params: Params, evaluations: Path) -> Place:
    """Return the number `ROW:COLUMN` of a study, by names.

    Raises:
        InputError: no such study, row or column, or more than one number fits.
    """
    row, colon, column = cell.rpartition(":")
    if not colon or not row or not column:
        raise InputError(f"'{cell}' is not of the form ROW:COLUMN", where="--cell", way_out="Write --cell hificl:coco")
    table = report.load_table(study, params, evaluations)
    file = evaluations.parent / "reports" / f"{study}.csv"
    entry = _named(table, row, column, study)
    return Place(study, table, entry, file if file.is_file() else None, _printed(_csv_rows(file), entry))


def every(study: str, params: Params, evaluations: Path) -> list[Place]:
    """Return all numbers of a study's report, those that are missing too.

    Raises:
        InputError: the study has not been evaluated.
    """
    table = report.load_table(study, params, evaluations)
    file = evaluations.parent / "reports" / f"{study}.csv"
    rows = _csv_rows(file)
    return [
        Place(study, table, entry, file if rows else None, _printed(rows, entry)) for entry in table.entries.values()
    ]


def _csv_rows(file: Path) -> list[dict[str, str]]:
    if not file.is_file():
        return []
    with file.open(newline="", encoding="utf-8") as handle:
        return list(csv.DictReader(handle))


def _identity(entry: TableEntry) -> tuple[str, str, str, str]:
    return entry.line.backbone, entry.column.task, entry.line.method, entry.metric


def _of_csv(table: Table, row: dict[str, str], column: str, where: str) -> TableEntry:
    wanted = tuple(row.get(name) or "" for name in ("backbone", "task", "method", "metric"))
    entry = next((entry for entry in table.entries.values() if _identity(entry) == wanted), None)
    if entry is None:
        raise InputError(
            f"the row {' '.join(wanted)} is not in the study's evaluation",
            where=where, way_out="The report is older than the evaluation: run dvc repro",
        )  # fmt: skip
    if column not in (*NUMBERS, entry.column.task, entry.metric):
        known = [*NUMBERS, entry.column.task]
        raise InputError(f"no run stands behind column '{column}'", where=where, way_out=nearest(column, known))
    return entry


def _named(table: Table, row: str, column: str, where: str) -> TableEntry:
    rows = [entry for entry in table.entries.values() if row in _row_names(entry)]
    if not rows:
        known = {entry.line.method for entry in table.entries.values()}
        raise InputError(f"no row '{row}'", where=where, way_out=nearest(row, known))
    entries = [entry for entry in rows if column in _column_names(entry)]
    if not entries:
        known = {entry.column.task for entry in rows}
        raise InputError(f"no column '{column}'", where=where, way_out=nearest(column, known))
    if len(entries) > 1:
        # the task's own score goes before its further metrics
        entries = [entry for entry in entries if entry.column.metric is None] or entries
    if len(entries) > 1:
        fits = ", ".join(f"{e.line.backbone}/{e.line.method}:{e.column.task}" for e in entries[:6])
        raise InputError(
            f"{len(entries)} numbers are called {row}:{column}", where=where, way_out=f"Give one of: {fits}"
        )
    return entries[0]


def _row_names(entry: TableEntry) -> set[str]:
    line = entry.line
    names = {line.row, line.method, line.label, line.title}
    return names | {f"{backbone}/{name}" for name in names for backbone in (line.backbone, line.paper_backbone)}


def _column_names(entry: TableEntry) -> set[str]:
    column = entry.column
    tasks = {column.task, column.paper_task, papers.label("tasks", column.task)}
    metrics = {entry.metric, papers.label("metrics", entry.metric)}
    return tasks | metrics | {f"{task}/{metric}" for task in tasks for metric in metrics} | set(NUMBERS)


def _printed(rows: list[dict[str, str]], entry: TableEntry) -> str | None:
    wanted = _identity(entry)
    names = ("backbone", "task", "method", "metric")
    return next((row.get("value") for row in rows if tuple(row.get(name) or "" for name in names) == wanted), None)


def expected(entry: TableEntry) -> str:
    """Return what the CSV must show for an entry."""
    return number(entry.value)
