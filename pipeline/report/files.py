"""What the report writes for machines: CSV, Markdown, and the JSON of `dvc metrics` and `dvc plots`."""

from __future__ import annotations

import csv
import io
import json
import re
from typing import Any

from pipeline.report import costs, papers
from pipeline.report.tables import Entry, Table

COLUMNS = ("backbone", "task", "method", "metric", "value", "std", "seeds", "paper", "run_ids")


def to_csv(table: Table) -> str:
    """Return one row a cell of the table; `value`, `std` and `paper` in the unit that the paper's table prints."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(COLUMNS)
    for line in table.lines:
        for entry in table.row(line):
            writer.writerow(
                [
                    line.backbone,
                    entry.column.task,
                    line.method,
                    entry.metric,
                    number(entry.value),
                    number(entry.std),
                    len(entry.done),
                    number(entry.paper),
                    ";".join(entry.run_ids),
                ]
            )
    return buffer.getvalue()


def to_markdown(table: Table, notes: list[str]) -> str:
    """Return the table as Markdown, with the notes that the page has."""
    out = [f"# {_md(table.study.title)}", ""]
    for backbone, lines in table.groups():
        paper = lines[0].paper_backbone
        stands = f" (stands for {_md(papers.label('backbones', paper))})" if paper != backbone else ""
        out += [f"## {_md(papers.label('backbones', backbone))}{stands}", ""]
        heads = [
            f"{_md(papers.label('tasks', e.column.task))} {_md(papers.label('metrics', e.metric))}"
            for e in table.row(lines[0])
        ]
        columns = costs.known(table)
        heads += [f"{cost.title} ({cost.below})" for cost in columns]
        out += ["| method | " + " | ".join(heads) + " |", "|---|" + "---:|" * len(heads)]
        for line in lines:
            spent = [costs.of_row(cost, table, line) or "-" for cost in columns]
            entries = [_md_entry(entry) for entry in table.row(line)]
            out.append("| " + " | ".join([_md(line.title), *entries, *spent]) + " |")
        out.append("")
    out += [f"- {_md(note)}" for note in notes]
    open_cells = [(entry, cell) for entry in table.entries.values() for cell in entry.open if not entry.column.metric]
    for entry, cell in open_cells:
        out.append(
            f"- {_md(entry.line.title)}, {_md(cell.task)}, seed {cell.seed}: **{cell.status}**"
            + (f": {_md(cell.error)}" if cell.error else "")
        )
    return "\n".join(out).rstrip() + "\n"


def to_metrics(table: Table) -> str:
    """Return the numbers by name, flat, for `dvc metrics`."""
    rows = {
        "/".join([line.backbone, entry.column.task, line.method, entry.metric]): _rounded(entry.value)
        for line in table.lines
        for entry in table.row(line)
        if entry.value is not None
    }
    return json.dumps(rows, indent=1, ensure_ascii=False) + "\n"


def to_plot(table: Table) -> str:
    """Return a record a number, with the varied axes as fields, for `dvc plots`."""
    rows: list[dict[str, Any]] = [
        {
            "cell": f"{entry.column.task} {line.method}",
            "backbone": line.backbone,
            "task": entry.column.task,
            "method": line.row,
            "metric": entry.metric,
            **dict(line.vary),
            "value": _rounded(entry.value),
            "std": _rounded(entry.std),
            "paper": _rounded(entry.paper),
        }
        for line in table.lines
        for entry in table.row(line)
        if entry.value is not None
    ]
    return json.dumps(rows, indent=1, ensure_ascii=False) + "\n"


def number(value: float | None) -> str:
    """Return a number for the CSV: up to six decimals, nothing for none."""
    return "" if value is None else f"{value:.6f}".rstrip("0").rstrip(".")


def shown(value: float, unit: str) -> str:
    """Return a number as the papers print its unit."""
    return f"{value:.{papers.decimals(unit)}f}"


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 6)


def _md_entry(entry: Entry) -> str:
    text: str = entry.cells[0].status if entry.cells else "-"
    if entry.value is not None:
        value = shown(entry.value, entry.unit)
        spread = f" ± {shown(entry.std, entry.unit)}" if entry.std is not None else ""
        text = {"best": f"**{value}**", "second": f"<u>{value}</u>"}.get(entry.mark, value) + spread
    return text if entry.paper is None else f"{text} (paper {shown(entry.paper, entry.unit)})"


def _md(text: str) -> str:
    """Return text that Markdown shows as it is: no markup, no HTML, no end of the table's cell."""
    text = re.sub(r"\s+", " ", text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_{}\[\]#|!])", r"\\\1", text)
