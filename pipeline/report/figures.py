"""The figures of a study: bars of each backbone, or curves over what it varies, with their words; losses by epoch."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from pipeline.report import bars, papers
from pipeline.report.drawing import (
    QUIET,
    Drawing,
    Look,
    fit_range,
    legend,
    line,
    looks,
    metric_words,
    safe,
    spaced,
    styled_svg,
)
from pipeline.report.statistics import mean_std
from pipeline.report.tables import Column, Line, Table, TableEntry

Name = tuple[str, tuple[tuple[str, Any], ...]]  # a curve: its row, and the varied axes that it does not run along


def draw_figures(table: Table, layout: str) -> dict[str, Drawing]:
    """Return a study's figures by name."""
    study = table.study.study
    if table.axes and layout != "table":
        axis = max(table.axes, key=lambda name: len({dict(line.vary).get(name) for line in table.lines}))
        curves = styled_svg(f"{study} {axis}", partial(curve_figure, table, axis))
        return {f"over-{safe(axis)}": Drawing(curves, _curve_words(table, axis))}
    return {
        f"bars-{safe(backbone)}": Drawing(
            styled_svg(f"{study} {backbone}", partial(bars.bar_figure, table, lines)), _bar_words(table, lines)
        )
        for backbone, lines in table.groups()
        if any(entry.value is not None for line in lines for entry in table.row(line))
    }


def curve_figure(table: Table, axis: str) -> Figure:
    """Return the curves over one varied axis: a panel a backbone and column, a curve a row and point of other axes."""
    groups = table.groups()
    columns = [c for c in table.columns if any(table.entries[line, c].value is not None for line in table.lines)]
    wide = max(1, len(columns))
    figure = Figure(
        figsize=(max(4.2, min(8.4, 3.4 * wide)), 0.4 + 2.9 * len(groups)), layout=ConstrainedLayoutEngine(w_pad=0.12)
    )
    grid = figure.subplots(len(groups), wide, squeeze=False)
    handles: dict[str, Any] = {}
    look = looks(table, lambda line: _name(line, axis))
    for panels, (backbone, lines) in zip(grid, groups, strict=True):
        for panel, column in zip(panels, columns, strict=False):
            _curve_panel(panel, table, lines, column, axis, look, handles)
            panel.set_title(f"{papers.label('tasks', column.task)}\n{papers.label('backbones', backbone)}")
    if len(handles) > 1:
        legend(figure, handles)
    return figure


def _curve_panel(
    panel: Axes, table: Table, lines: Sequence[Line], column: Column, axis: str, look: dict[Name, Look],
    handles: dict[str, Any],
) -> None:  # fmt: skip
    points: dict[Name, list[tuple[Any, TableEntry]]] = {}
    for row in lines:
        entry, at = table.entries[row, column], dict(row.vary).get(axis)
        if entry.value is not None and at is not None:
            points.setdefault(_name(row, axis), []).append((at, entry))
    every = [point for curve in points.values() for point in curve]
    numeric = all(isinstance(at, int | float) and not isinstance(at, bool) for at, _ in every)
    ticks = sorted({at for at, _ in every}, key=lambda at: (0, at) if numeric else (1, str(at)))
    for name, curve in points.items():
        curve.sort(key=lambda point: ticks.index(point[0]))
        xs = [at if numeric else ticks.index(at) for at, _ in curve]
        drawn = line(panel, xs, [e.value or 0.0 for _, e in curve], [e.std or 0.0 for _, e in curve], look[name])
        others = [f"{papers.label('axes', key)} = {value}" for key, value in name[1]]
        handles.setdefault(", ".join([curve[0][1].line.label, *others]), drawn)
    if numeric and ticks and min(ticks) > 0 and max(ticks) / min(ticks) >= 8:
        panel.set_xscale("log")
    panel.minorticks_off()
    xs = [at if numeric else place for place, at in enumerate(ticks)]
    panel.set_xticks(xs, spaced(panel, xs, [f"{at}" for at in ticks]))
    panel.set_xlabel(papers.label("axes", axis))
    panel.set_ylabel(metric_words(table.entries[lines[0], column]))
    panel.grid(axis="y", color=QUIET, alpha=0.3, linewidth=0.7)
    if every:
        spans = [((e.value or 0.0) - (e.std or 0.0), (e.value or 0.0) + (e.std or 0.0)) for _, e in every]
        fit_range(panel, min(low for low, _ in spans), max(high for _, high in spans))


def _name(line: Line, axis: str) -> Name:
    return line.row, tuple(pair for pair in line.vary if pair[0] != axis)


def _bar_words(table: Table, lines: Sequence[Line]) -> str:
    rows = []
    for column in table.columns:
        shown = [table.entries[line, column] for line in lines]
        parts = [f"{e.line.title} {e.value:.{papers.decimals(e.unit)}f}" for e in shown if e.value is not None]
        if parts:
            name = f"{papers.label('tasks', column.task)} {papers.label('metrics', shown[0].metric)}"
            rows.append(f"{name}: {', '.join(parts)}")
    beside = ", ours above the paper's" if any(e.paper is not None for i in lines for e in table.row(i)) else ""
    return f"Bars on {papers.label('backbones', lines[0].backbone)}{beside}. {'; '.join(rows)}."


def _curve_words(table: Table, axis: str) -> str:
    rows = list(dict.fromkeys(line.label for line in table.lines))
    tasks = list(dict.fromkeys(papers.label("tasks", column.task) for column in table.columns))
    over = papers.label("axes", axis)
    return f"Score over {over} for {', '.join(rows)} on {', '.join(tasks)}, with the spread over seeds."


def draw_losses(table: Table) -> dict[str, Drawing]:
    """Return the figures of a study without varied axes, by name."""
    if table.axes:
        return {}
    drawings = {}
    for backbone, lines in table.groups():
        columns = [c for c in table.columns if c.metric is None and any(_curve(table.entries[i, c]) for i in lines)]
        if columns:
            rows = [line for line in lines if any(_curve(table.entries[line, column]) for column in columns)]
            losses = styled_svg(f"{table.study.study} losses {backbone}", partial(loss_figure, table, rows, columns))
            drawings[f"loss-{safe(backbone)}"] = Drawing(losses, _words(rows, columns))
    return drawings


def _curve(entry: TableEntry) -> list[tuple[float, float, float]]:
    """Return (epoch, loss averaged over the seeds that have it, its standard deviation over them)."""
    by_epoch: dict[float, list[float]] = {}
    for cell in entry.done:
        for row in cell.epochs:
            if row.ground_truth_loss is not None:  # the answers' cross-entropy, the one loss that all methods share
                by_epoch.setdefault(row.epoch, []).append(row.ground_truth_loss)
    averaged = {epoch: mean_std(values) for epoch, values in sorted(by_epoch.items())}
    return [(epoch, mean, std or 0.0) for epoch, (mean, std) in averaged.items()]


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
