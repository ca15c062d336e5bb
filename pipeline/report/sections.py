"""A study's part of the page, as what its template shows."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from markupsafe import Markup

from pipeline.report import costs, papers
from pipeline.report.evaluations import Cell
from pipeline.report.files import shown, to_csv
from pipeline.report.notes import notes
from pipeline.report.panels import metric_words
from pipeline.report.svg import safe
from pipeline.report.tables import Column, Line, Table


def study(
    table: Table, source: papers.Source | None, figures: Mapping[str, tuple[str, str]], gallery: Any
) -> dict[str, Any]:
    """Return what `study.html.j2` shows."""
    columns = costs.known(table)
    every = notes(table)
    if source and source.note:
        every.append(f"{source.paper}, {source.place}: {source.note}.")
    runs = _runs(table)
    places = {(row["line"], row["cell"].task): row["place"] for row in reversed(runs) if row["value"]}
    return {
        "name": table.study.study,
        "title": table.study.title,
        "csv": "data:text/csv;base64," + base64.b64encode(to_csv(table).encode()).decode(),
        "total": len(table.study.cells),
        "gone": len(table.study.cells) - done(table),
        "code": code(table.study.provenance),
        "notes": every,
        "problems": problems(table.study.cells),
        "costs": columns,
        "heads": [_head(table, column) for column in table.columns],
        "groups": [
            {
                "title": papers.label("backbones", backbone),
                "below": f"stands for {papers.label('backbones', lines[0].paper_backbone)}"
                if backbone != lines[0].paper_backbone
                else "",
                "rows": [_row(table, line, source, columns, places) for line in lines],
            }
            for backbone, lines in table.groups()
        ],
        "figures": [
            {"svg": Markup(svg), "words": words, "caption": _caption(table, name)}  # noqa: S704 - our own SVG
            for name, (svg, words) in figures.items()
        ],
        "shape": len(table.columns) + 1 + len(columns),
        "figures_first": bool(table.axes),
        "gallery": gallery,
        "reference": next((line.label for line in table.lines if line.row == table.reference), ""),
        "differences": [entry for entry in table.entries.values() if entry.difference],
        "runs": runs,
    }


def done(table: Table) -> int:
    """Return how many of a study's cells have their number."""
    return sum(cell.status == "done" and cell.value is not None for cell in table.study.cells)


def code(origin: Mapping[str, Any], whole: bool = False) -> str:
    """Return the commit that a study was evaluated at, or why there is none."""
    commit = origin.get("commit")
    if not commit:
        return str(origin.get("note") or "")
    text = str(commit) if whole else str(commit)[:10]
    return f"{text} with uncommitted changes" if origin.get("dirty") else text


def short(value: Any) -> str:
    """Return a value of a setting in few letters."""
    if isinstance(value, float):
        return f"{value:g}"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _runs(table: Table) -> list[dict[str, Any]]:
    """Return the rows of the table of runs: one a cell, each with its place in the page."""
    every = [(e, cell) for e in table.entries.values() if e.column.metric is None for cell in e.cells]
    return [
        {
            "place": f"{safe(table.study.study)}-run-{number}",
            "line": entry.line,
            "title": entry.line.title,
            "backbone": papers.label("backbones", entry.line.backbone),
            "task": papers.label("tasks", entry.column.task),
            "cell": cell,
            "chosen": ", ".join(f"{key} = {short(value)}" for key, value in cell.searched.items()),
            "value": ""
            if cell.value is None
            else shown(papers.convert(cell.value, cell.unit or entry.unit, entry.unit), entry.unit),
        }
        for number, (entry, cell) in enumerate(every, start=1)
    ]


def _row(
    table: Table,
    line: Line,
    source: papers.Source | None,
    columns: Sequence[costs.Cost],
    places: Mapping[tuple[Line, str], str],
) -> dict[str, Any]:
    printed = papers.figure(source.path, line.paper_backbone, line.row, "params_m") if source else None
    size = f"{printed:g} M" if printed is not None else ""
    return {
        "title": line.title,
        "entries": [(entry, places.get((line, entry.column.task), "")) for entry in table.row(line)],
        "costs": [
            {
                "text": costs.of_row(cost, table, line),
                "value": fmean(spent) if (spent := costs.values(cost, table, line)) else None,
                "paper": size if cost.field == "trainable_parameters" else "",
            }
            for cost in columns
        ],
    }


def _head(table: Table, column: Column) -> dict[str, str]:
    entry = table.entries[table.lines[0], column]
    reference = next((line.label for line in table.lines if line.row == table.reference), "")
    metric = metric_words(entry, reference)
    lower = papers.metric_facts(entry.metric).get("lower_is_better")
    own = papers.label("tasks", column.task)
    stands = f"{own} for {papers.label('tasks', column.paper_task)}" if column.task != column.paper_task else own
    return {
        "title": metric if column.metric else own,
        "below": f"{stands}{', lower is better' if lower else ''}"
        if column.metric
        else (
            metric if column.task == column.paper_task else f"{metric}; for {papers.label('tasks', column.paper_task)}"
        ),
    }


def _caption(table: Table, name: str) -> str:
    bars = name.startswith("bars-")
    shown_here = [entry for entry in table.entries.values() if f"bars-{safe(entry.line.backbone)}" == name]
    printed = [entry for entry in shown_here if entry.paper is not None]
    own = any(not entry.comparable for entry in printed)
    parts = [f"Above: ours. Below, hollow: the paper's{', on axes of their own' if own else ''}."] if printed else []
    repeated = any(entry.std is not None for entry in table.entries.values())
    parts.append(f"{'Whiskers' if bars else 'Bands'}: one standard deviation over seeds." if repeated else "One seed.")
    return " ".join(parts)


def problems(cells: Sequence[Cell]) -> list[str]:
    """Return what is not there, one sentence for all seeds of the same trouble."""
    seeds: dict[tuple[str, str], list[int]] = {}
    for cell in cells:
        if cell.status != "done":
            where = [cell.label, papers.label("backbones", cell.backbone), papers.label("tasks", cell.task)]
            where += [f"{axis} = {value}" for axis, value in cell.vary.items()]
            what = f"{cell.status}. {cell.error}" if cell.error else cell.status
            seeds.setdefault((", ".join(where), what), []).append(cell.seed)
    return [
        f"{where}, seed{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}: {what}"
        for (where, what), numbers in seeds.items()
    ]
