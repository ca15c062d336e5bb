"""What the report writes for machines: CSV, Markdown, and the numbers of `dvc metrics` and `dvc plots`."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable, Sequence

from pipeline.report import papers
from pipeline.report.tables import Table, TableEntry, cost_of, costs_of

COLUMNS = ("backbone", "task", "method", "metric", "value", "std", "seeds", "paper", "run_ids")
Tree = dict[str, "Tree | float"]  # numbers by name, nested as `dvc metrics` shows them

SCORES = ("study", "backbone", "task", "metric", "unit", "method", "value")


def to_csv(table: Table) -> str:
    """Return one row a cell of the table; `value`, `std` and `paper` in the unit that the paper's table prints."""
    rows = []
    for line in table.lines:
        for entry in table.row(line):
            names, numbers = (line.backbone, entry.column.task, line.method, entry.metric), (entry.value, entry.std)
            rows.append((*names, *map(number, numbers), len(entry.done), number(entry.paper), ";".join(entry.run_ids)))
    return _csv(COLUMNS, rows)


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
        columns = costs_of(table)
        heads += [f"{cost.title} ({cost.below})" for cost in columns]
        out += ["| method | " + " | ".join(heads) + " |", "|---|" + "---:|" * len(heads)]
        for line in lines:
            spent = [cost_of(cost, table, line) or "-" for cost in columns]
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
    """Return a study's numbers by task, metric and method, for `dvc metrics diff --targets`.

    By backbone first, where it has several.
    """
    several = len(table.groups()) > 1
    numbers: Tree = {}
    for line in table.lines:
        for entry in table.row(line):
            if entry.value is not None:
                place = [*([line.backbone] if several else []), entry.column.task, entry.metric, line.method]
                _put(numbers, place, _printed(entry))
    return _json(numbers)


def to_scores(tables: Sequence[Table]) -> str:
    """Return a row a number of several studies, for `dvc plots`; without its run, so that equal numbers are equal."""
    rows = []
    for table in tables:
        for line in table.lines:
            for entry in table.row(line):
                if entry.value is not None:
                    names = (table.study.study, line.backbone, entry.column.task, entry.metric, entry.unit)
                    rows.append((*names, line.method, format_value(entry.value, entry.unit)))
    return _csv(SCORES, rows)


def to_summary(tables: Sequence[Table]) -> str:
    """Return the few numbers of `dvc metrics show` and `dvc exp show`: by task, the score of a study's own method.

    That is the row which has its paper's name, else the last that trains, else the last, and of a curve the last point.
    Of several studies with the same row the first decides. Method and backbone are named where there are several.
    """
    rows: dict[tuple[str, str, str], float] = {}
    for table in tables:
        for backbone, lines in table.groups():
            named = [line for line in lines if line.row == table.study.study.partition("-")[0]]
            trained = [line for line in lines if any(c.trainable_parameters for e in table.row(line) for c in e.cells)]
            line = (named or trained or lines)[-1]
            for entry in table.row(line):
                if entry.column.metric is None and _is_score(entry):
                    rows.setdefault((entry.column.task, line.row, backbone), _printed(entry))
    several = [len({place[level] for place in rows}) > 1 for level in (1, 2)]
    numbers: Tree = {}
    for (task, *further), value in rows.items():
        _put(numbers, [task, *(name for name, wanted in zip(further, several, strict=True) if wanted)], value)
    return _json(numbers)


def _csv(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows([heads, *rows])
    return buffer.getvalue()


def number(value: float | None) -> str:
    """Return a number for the CSV: up to six decimals, nothing for none."""
    return "" if value is None else f"{value:.6f}".rstrip("0").rstrip(".")


def format_value(value: float, unit: str) -> str:
    """Return a number as the papers print its unit."""
    return f"{value:.{papers.decimals(unit)}f}"


def _is_score(entry: TableEntry) -> bool:
    return entry.value is not None and all(cell.measurement is None for cell in entry.done)


def _printed(entry: TableEntry) -> float:
    return float(format_value(entry.value or 0.0, entry.unit))


def _put(tree: Tree, place: Sequence[str], value: float) -> None:
    for name in place[:-1]:
        branch = tree.setdefault(name, {})
        assert isinstance(branch, dict)  # noqa: S101 - every number stands at the same depth
        tree = branch
    tree[place[-1]] = value


def _json(tree: Tree) -> str:
    return json.dumps(tree, indent=1, ensure_ascii=False) + "\n"


def _md_entry(entry: TableEntry) -> str:
    text: str = entry.cells[0].status if entry.cells else "-"
    if entry.value is not None:
        value = format_value(entry.value, entry.unit)
        spread = f" ± {format_value(entry.std, entry.unit)}" if entry.std is not None else ""
        text = {"best": f"**{value}**", "second": f"<u>{value}</u>"}.get(entry.mark, value) + spread
    return text if entry.paper is None else f"{text} (paper {format_value(entry.paper, entry.unit)})"


def _md(text: str) -> str:
    """Return text that Markdown shows as it is: no markup, no HTML, no end of the table's cell."""
    text = re.sub(r"\s+", " ", text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_{}\[\]#|!])", r"\\\1", text)
