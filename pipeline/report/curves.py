"""Losses by epoch, one panel a task, one line a row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from pipeline.records.evaluation import CellResult
from pipeline.report import papers
from pipeline.report.panels import fit_range, legend, line
from pipeline.report.statistics import mean_std
from pipeline.report.svg import QUIET, STYLE, Drawing, looks, safe, to_svg
from pipeline.report.tables import Column, Line, Table, TableEntry


def draw_losses(table: Table) -> dict[str, Drawing]:
    """Return the figures of a study without varied axes, by name."""
    if table.axes:
        return {}
    drawings = {}
    for backbone, lines in table.groups():
        columns = [c for c in table.columns if c.metric is None and any(_curve(table.entries[i, c]) for i in lines)]
        if columns:
            rows = [line for line in lines if any(_curve(table.entries[line, column]) for column in columns)]
            words = _words(rows, columns)
            drawings[f"loss-{safe(backbone)}"] = Drawing(_draw(table, rows, columns), words)
    return drawings


def _curve(entry: TableEntry) -> list[tuple[float, float, float]]:
    """Return (epoch, loss averaged over the seeds that have it, its standard deviation over them)."""
    by_epoch: dict[float, list[float]] = {}
    for cell in entry.done:
        for epoch, loss in _points(cell):
            by_epoch.setdefault(epoch, []).append(loss)
    averaged = {epoch: mean_std(values) for epoch, values in sorted(by_epoch.items())}
    return [(epoch, mean, std or 0.0) for epoch, (mean, std) in averaged.items()]


def _points(cell: CellResult) -> list[tuple[float, float]]:
    """Return epoch and loss of the answers' cross-entropy, the one loss that all methods share."""
    return [(row.epoch, row.ground_truth_loss) for row in cell.epochs if row.ground_truth_loss is not None]


def _draw(table: Table, lines: Sequence[Line], columns: Sequence[Column]) -> str:
    with mpl.rc_context({**STYLE, "svg.hashsalt": f"{table.study.study} losses {lines[0].backbone}"}):
        return to_svg(loss_figure(table, lines, columns))


def loss_figure(table: Table, lines: Sequence[Line], columns: Sequence[Column]) -> Figure:
    """Return the losses of these lines, a panel a column."""
    made = Figure(figsize=(max(5.6, min(8.4, 3.0 * len(columns))), 2.9), layout=ConstrainedLayoutEngine())
    panels = made.subplots(1, len(columns), squeeze=False)[0]
    handles: dict[str, Any] = {}
    look = looks(table, lambda row: row.row)
    for panel, column in zip(panels, columns, strict=True):
        curves = {row: curve for row in lines if (curve := _curve(table.entries[row, column]))}
        for row, curve in curves.items():
            epochs, values, spread = zip(*curve, strict=True)
            handles.setdefault(row.title, line(panel, epochs, values, spread, look[row.row]))
        points = [point for curve in curves.values() for point in curve]
        if points:
            fit_range(panel, min(mean - std for _, mean, std in points), max(mean + std for _, mean, std in points))
        panel.set_title(papers.label("tasks", column.task))
        panel.set_xlabel("epoch")
        panel.xaxis.get_major_locator().set_params(integer=True)
        panel.grid(axis="y", color=QUIET, alpha=0.3, linewidth=0.7)
    panels[0].set_ylabel("loss of the answers (nats)")
    legend(made, handles)
    return made


def _words(lines: Sequence[Line], columns: Sequence[Column]) -> str:
    tasks = ", ".join(papers.label("tasks", column.task) for column in columns)
    return f"Training loss of the answers by epoch for {', '.join(line.title for line in lines)} on {tasks}."
