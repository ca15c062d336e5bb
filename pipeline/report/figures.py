"""The figures of a study, with their words: bars, curves over what it varies, score against cost; layers; losses."""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

from pipeline.core.statistics import mean_std
from pipeline.report import papers
from pipeline.report.drawing import (
    INK,
    QUIET,
    Drawing,
    Look,
    fit_range,
    legend,
    line,
    looks,
    safe,
    spaced,
    wrapped,
)
from pipeline.report.tables import Column, Cost, Line, Table, TableEntry, costs_of, metric_words

Name = tuple[str, tuple[tuple[str, Any], ...]]  # a curve: its row, and the varied axes that it does not run along


def draw_figures(table: Table, layout: str) -> dict[str, Drawing]:
    """Return a study's figures by name."""
    study = table.study.study
    if layout == "pareto":
        return {
            f"cost-{safe(backbone)}": Drawing(
                f"{study} cost {backbone}", partial(cost_figure, table, lines), _cost_words(table, lines)
            )
            for backbone, lines in table.groups()
            if any(_priced(table, lines, column, cost) for column in _own(table) for cost in costs_of(table))
        }
    if table.axes and layout != "table":
        axis = max(table.axes, key=lambda name: len({dict(line.vary).get(name) for line in table.lines}))
        curves = Drawing(f"{study} {axis}", partial(curve_figure, table, axis), _curve_words(table, axis))
        return {f"over-{safe(axis)}": curves}
    return {
        f"bars-{safe(backbone)}": Drawing(
            f"{study} {backbone}", partial(bar_figure, table, lines), _bar_words(table, lines)
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


def front(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the (cost, score) that no cheaper or equally cheap point reaches, by cost."""
    best: list[tuple[float, float]] = []
    for cost, score in sorted(points, key=lambda point: (point[0], -point[1])):
        if not best or score > best[-1][1]:
            best.append((cost, score))
    return best


def _own(table: Table) -> list[Column]:
    return [column for column in table.columns if column.metric is None]


def _priced(table: Table, lines: Sequence[Line], column: Column, cost: Cost) -> dict[Line, tuple[float, float]]:
    """Return (mean cost of its seeds, score) of each row that has both."""
    points = {}
    for row in lines:
        entry = table.entries[row, column]
        known = [float(value) for value in (getattr(cell, cost.field) for cell in entry.cells) if value]
        if known and entry.value is not None:
            points[row] = fmean(known), entry.value
    return points


def cost_figure(table: Table, lines: Sequence[Line]) -> Figure:
    """Return score against what it takes to train: a panel a task and cost, a point a row, and the front of the best.

    Rows that train nothing are level lines.
    """
    columns = [column for column in _own(table) if any(table.entries[row, column].value is not None for row in lines)]
    costs = [cost for cost in costs_of(table) if any(_priced(table, lines, column, cost) for column in columns)]
    across = min(2, len(costs)) if len(columns) == 1 else len(costs)
    places = [(column, cost) for column in columns for cost in costs]
    down = -(-len(places) // across)
    made = Figure(figsize=(max(4.2, 3.6 * across), 2.9 * down), layout=ConstrainedLayoutEngine(w_pad=0.1))
    panels = made.subplots(down, across, squeeze=False).ravel()
    look = looks(table, lambda row: (row.row, row.vary))
    handles: dict[str, Any] = {}
    for panel, (column, cost) in zip(panels, places, strict=False):
        points, heights = _priced(table, lines, column, cost), list[float]()
        for row in lines:
            entry, style = table.entries[row, column], look[row.row, row.vary]
            if entry.value is None:
                continue
            heights += [entry.value - (entry.std or 0.0), entry.value + (entry.std or 0.0)]
            if row in points:
                drawn = panel.errorbar(
                    points[row][0], entry.value, yerr=entry.std or None, color=style.colour, marker=style.marker,
                    markersize=6, fillstyle=style.fill, linestyle="none",
                    elinewidth=1, capsize=2,
                )  # fmt: skip
            else:
                drawn = panel.axhline(entry.value, color=style.colour, linestyle=style.dash, linewidth=1.2)
            handles.setdefault(row.title, drawn)
        if best := front(points.values()):
            xs, ys = zip(*best, strict=True)
            panel.step(xs, ys, where="post", color=INK, linewidth=0.9, alpha=0.6, zorder=0)
            panel.set_xscale("log")
            ticks = cost.ticks([at for at, _ in points.values()])
            panel.set_xlim(ticks[0] * 0.9, ticks[-1] * 1.1)
            panel.set_xticks(ticks, spaced(panel, ticks, [cost.text([tick]) for tick in ticks]))
        panel.minorticks_off()
        panel.set_title(papers.label("tasks", column.task))
        panel.set_xlabel(cost.axis)
        panel.set_ylabel(metric_words(table.entries[lines[0], column]))
        panel.grid(axis="y", color=QUIET, alpha=0.3, linewidth=0.7)
        fit_range(panel, min(heights), max(heights))
    for panel in panels[len(places) :]:
        panel.set_axis_off()
    legend(made, handles)
    return made


def _cost_words(table: Table, lines: Sequence[Line]) -> str:
    sentences = []
    for column in _own(table):
        for cost in costs_of(table):
            points = _priced(table, lines, column, cost)
            best = front(points.values())
            named = [f"{row.title} {cost.text([at[0]])}" for at in best for row in lines if points.get(row) == at]
            if named:
                sentences.append(f"{papers.label('tasks', column.task)}, {cost.axis}: {', '.join(named)}")
    return f"Score against cost. No row is both cheaper and better than these: {'; '.join(sentences)}."


def draw_losses(table: Table) -> dict[str, Drawing]:
    """Return the figures of a study without varied axes, by name."""
    if table.axes:
        return {}
    drawings = {}
    for backbone, lines in table.groups():
        columns = [c for c in table.columns if c.metric is None and any(_curve(table.entries[i, c]) for i in lines)]
        if columns:
            rows = [line for line in lines if any(_curve(table.entries[line, column]) for column in columns)]
            name, draw = f"{table.study.study} losses {backbone}", partial(loss_figure, table, rows, columns)
            drawings[f"loss-{safe(backbone)}"] = Drawing(name, draw, _words(rows, columns))
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


Layered = dict[tuple[Column, str], dict[Line, list[np.ndarray]]]  # by task and number, a row's values, one a seed


def draw_layers(table: Table) -> dict[str, Drawing]:
    """Return the figures of what was measured layer by layer, by name: curves; of virtual tokens maps."""
    drawings = {}
    for backbone, lines in table.groups():
        for kind, field, draw in (("layers", "by_layer", layer_figure), ("tokens", "by_token", token_figure)):
            if known := _layered(table, lines, field):
                numbers = dict.fromkeys(papers.label("metrics", name) for _, name in known)
                rows = dict.fromkeys(row.title for of_rows in known.values() for row in of_rows)
                words = f"By layer{' and virtual token' * (kind == 'tokens')}: {', '.join(numbers)}; {', '.join(rows)}"
                words += f" on {papers.label('backbones', backbone)}."
                name = f"{table.study.study} {kind} {backbone}"
                drawings[f"{kind}-{safe(backbone)}"] = Drawing(name, partial(draw, table, known), words)
    return drawings


def _layered(table: Table, lines: Sequence[Line], field: str) -> Layered:
    known: Layered = {}
    for column, row in ((column, row) for column in _own(table) for row in lines):
        for cell in table.entries[row, column].cells:
            for name, values in getattr(cell.layers, field, {}).items():
                shown = np.array(values) * papers.convert(1.0, cell.units[name], papers.metric_facts(name).unit)
                known.setdefault((column, name), {}).setdefault(row, []).append(shown)
    order = [entry.metric for entry in table.row(lines[0])]  # a file has its names by the alphabet
    place = {name: order.index(name) if name in order else len(order) for _, name in known}
    return dict(sorted(known.items(), key=lambda item: (table.columns.index(item[0][0]), place[item[0][1]])))


def layer_figure(table: Table, known: Layered) -> Figure:
    """Return curves over the layers: a panel a task and number, a curve a row; panels of one unit share their axis."""
    across = min(3, len(known))
    down = -(-len(known) // across)
    made = Figure(figsize=(max(4.6, 2.8 * across), 2.7 * down), layout=ConstrainedLayoutEngine(w_pad=0.1))
    panels = made.subplots(down, across, squeeze=False).ravel()
    look, handles = looks(table, lambda row: (row.row, row.vary)), dict[str, Any]()
    ends: dict[str | None, list[float]] = {}
    for panel, ((column, name), of_rows) in zip(panels, known.items(), strict=False):
        for row, seeds in of_rows.items():
            mean, spread = np.mean(seeds, 0), np.std(seeds, 0, ddof=1) if len(seeds) > 1 else np.zeros(len(seeds[0]))
            layers = range(1, len(mean) + 1)
            handles.setdefault(row.title, line(panel, layers, mean.tolist(), spread.tolist(), look[row.row, row.vary]))
            ends.setdefault(papers.metric_facts(name).unit, []).extend(
                [*np.maximum(mean - spread, 0), *(mean + spread)]
            )
        panel.set_title(f"{papers.label('tasks', column.task)}\n{wrapped(papers.label('metrics', name), 22)}")
        panel.set_xlabel("layer")
        panel.set_ylabel(_unit_words(name))
        panel.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        panel.grid(axis="y", color=QUIET, alpha=0.3, linewidth=0.7)
    for panel, (_, name) in zip(panels, known, strict=False):
        heights = ends[papers.metric_facts(name).unit]
        fit_range(panel, min(heights), max(heights))
    for panel in panels[len(known) :]:
        panel.set_axis_off()
    legend(made, handles)
    return made


def token_figure(table: Table, known: Layered) -> Figure:
    """Return maps of layers and virtual tokens: a row of maps a task and row of the table, a column a number.

    Each is of the row's first seed: the i-th token of one seed has nothing to do with another seed's. The colours go by
    the root of the share, so that one token of eight is seen beside a method's only one.
    """
    names = list(dict.fromkeys(name for _, name in known))
    rows = list(dict.fromkeys((column, row) for (column, _), of_rows in known.items() for row in of_rows))
    every = [seeds[0] for of_rows in known.values() for seeds in of_rows.values()]
    layers, tokens = (max(values.shape[axis] for values in every) for axis in (0, 1))
    size = max(1.5, min(2.6, 0.2 * tokens)), max(1.0, min(3.2, 0.2 * layers))
    made = Figure(
        figsize=(1.4 + size[0] * len(names), 0.9 + (size[1] + 0.15) * len(rows)), layout=ConstrainedLayoutEngine()
    )
    grid = made.subplots(len(rows), len(names), squeeze=False, sharex=True, sharey=True)
    top = max(values.max() for values in every)
    ticks = [0, *(tick for power in range(-3, 4) for tick in (10**power, 2 * 10**power, 5 * 10**power))]
    shades, ticks = PowerNorm(0.5, 0, top), [tick for tick in ticks if not tick or top / 100 <= tick <= top]
    for panels, (column, row) in zip(grid, rows, strict=True):
        for panel, name in zip(panels, names, strict=True):
            panel.spines[:].set_visible(False)
            panel.tick_params(length=0)
            values = known.get((column, name), {}).get(row)
            if values:
                edges = [np.arange(length + 1) + 0.5 for length in values[0].shape[::-1]]
                mesh = panel.pcolormesh(*edges, values[0], norm=shades, edgecolors="face", linewidth=0.3)
        several = len({of.task for of, _ in rows}) > 1
        head = [row.title, *([papers.label("tasks", column.task)] if several else [])]
        panels[0].set_ylabel("\n".join([*(wrapped(part, 14) for part in head), "layer"]))
    for panel, name in zip(grid[0], names, strict=True):
        panel.set_title(
            wrapped(papers.label("metrics", name), int(size[0] / _LETTER)), fontsize=9.5, fontweight="normal"
        )
    for panel in grid[-1]:
        panel.set_xlabel("virtual token i")
    panel.set_xlim(0.5, tokens + 0.5)
    panel.set_ylim(0.5, layers + 0.5)
    for axis in (panel.xaxis, panel.yaxis):
        axis.set_major_locator(MaxNLocator(4, integer=True, steps=[1, 2, 5, 10]))
    made.colorbar(
        mesh, ax=grid, ticks=ticks, format="%g", label=f"a token's share ({_unit_words(names[0])})", aspect=30
    )
    return made


def _unit_words(name: str) -> str:
    unit = papers.metric_facts(name).unit or ""
    return papers.sign(unit) or unit


_ACROSS = 4  # panels in a row at most
_LETTER = 0.08  # of a title, in inches
_ROOM = 1.3  # axis length over the longest bar's: its number is written behind it


@dataclass(frozen=True)
class _Bar:
    value: float | None
    std: float | None
    gone: str


@dataclass(frozen=True)
class _Panel:
    """One task's bars of one metric.

    Attributes:
        column: of the table.
        entry: the first line's, for metric and unit.
        bars: a bar a line.
        printed: whether they are the paper's.
        quantity: panels of the same one share their axis.
    """

    column: Column
    entry: TableEntry
    bars: list[_Bar]
    printed: bool
    quantity: tuple[bool, str]

    @property
    def end(self) -> float:
        """Where the longest bar ends, whisker and all."""
        return max((bar.value + (bar.std or 0.0) for bar in self.bars if bar.value is not None), default=0.0)


def bar_figure(table: Table, lines: Sequence[Line]) -> Figure:
    """Return the figure: a column a task, or a metric where a task has several; ours, and below them the paper's."""
    rows = _rows(table, lines)
    across = max(len(row) for row in rows)
    titles = [wrapped(line.title) for line in lines]
    beside = 0.5 + 0.075 * max(len(part) for title in titles for part in title.splitlines())
    tall = 0.1 * len(lines) + 0.155 * sum(1 + title.count("\n") for title in titles)
    wide = max(1.75, min(3.6, 5.4 / across))
    reference = next((line.label for line in lines if line.row == table.reference), "")
    heads = [[wrapped(metric_words(panel.entry, reference), int(wide / _LETTER)) for panel in row] for row in rows]
    above = sum(0.155 * max(head.count("\n") for head in row) for row in heads)
    made = Figure(
        figsize=(beside + wide * across, 0.3 + (0.8 + tall) * len(rows) + above),
        layout=ConstrainedLayoutEngine(h_pad=0.07, w_pad=0.05),
    )
    grid = made.subplots(len(rows), across, squeeze=False)
    ends: dict[tuple[bool, str], float] = {}
    for panel in (panel for row in rows for panel in row):
        ends[panel.quantity] = max(ends.get(panel.quantity, 0.0), panel.end)
    look = looks(table, lambda line: (line.row, line.vary))
    styles = [look[line.row, line.vary] for line in lines]
    strong = {place for place, line in enumerate(lines) if line.row == table.reference and len(lines) > 1}
    for place, (axes_row, row) in enumerate(zip(grid, rows, strict=True)):
        begins = place == 0 or rows[place - 1][0].printed != row[0].printed
        for axes, panel, head in zip(axes_row, row, heads[place], strict=False):
            _bars(axes, panel, styles, ends[panel.quantity] or 1.0, strong)
            task = papers.label("tasks", panel.column.paper_task if panel.printed else panel.column.task)
            axes.set_title("\n\n" * begins + f"{task}\n{head}", fontweight="normal", fontsize=9.5)
            axes.set_yticks(range(len(lines)), titles if axes is axes_row[0] else [""] * len(lines))
        for axes in axes_row[len(row) :]:
            axes.set_axis_off()
        if begins:
            lines_more = max(head.count("\n") for head in heads[place])
            _write_name(axes_row[0], lines[0], row[0].printed, both=rows[-1][0].printed, height=33 + 11.4 * lines_more)
    return made


def _rows(table: Table, lines: Sequence[Line]) -> list[list[_Panel]]:
    """Return the panels as they stand: a row a task where tasks have several metrics, else all tasks in one."""
    columns = [c for c in table.columns if any(table.entries[line, c].value is not None for line in lines)]
    by_task = any(column.metric is not None for column in columns)
    tasks = list(dict.fromkeys(column.task for column in columns)) if by_task else [None]
    rows = []
    for printed in (False, True):
        for task in tasks:
            panels = [_panel(table, lines, column, printed) for column in columns if task in (None, column.task)]
            known = [panel for panel in panels if any(bar.value is not None for bar in panel.bars)]
            rows += [known[start : start + _ACROSS] for start in range(0, len(known), _ACROSS)]
    return rows


def _panel(table: Table, lines: Sequence[Line], column: Column, printed: bool) -> _Panel:
    entries = [table.entries[line, column] for line in lines]
    bars = [
        _Bar(None, None, "–")
        if not entry.cells
        else _Bar(entry.paper, None, "not printed")
        if printed
        else _Bar(entry.value, entry.std, "no number")
        for entry in entries
    ]
    first = next((entry for entry in entries if entry.value is not None), entries[0])
    own_axis = printed and not first.comparable  # another model's numbers get an axis of their own
    return _Panel(column, first, bars, printed, (own_axis, first.unit if first.unit == "times" else first.metric))


def _bars(axes: Axes, panel: _Panel, look: Sequence[Look], end: float, strong: Container[int]) -> None:
    digits = min(papers.decimals(panel.entry.unit), 1 if panel.entry.unit == "percent" else 4)
    below = min([0.0, *(bar.value for bar in panel.bars if bar.value is not None)])
    axes.set_xlim(below, end * _ROOM)
    axes.xaxis.set_major_locator(MaxNLocator(3, steps=[1, 2, 5, 10]))
    axes.set_xticks(ticks := [tick for tick in axes.get_xticks() if below <= tick <= end * _ROOM])
    axes.spines["bottom"].set_bounds(below, max(end, *ticks))
    axes.tick_params(axis="x", labelsize=8, length=2)
    axes.grid(axis="x", color=QUIET, alpha=0.3, linewidth=0.7)
    if panel.entry.unit == "times":
        axes.axvline(1, color=INK, linewidth=0.8, linestyle=(0, (3, 3)))
    for place, (bar, style) in enumerate(zip(panel.bars, look, strict=True)):
        if bar.value is None:
            _beside(axes, 0, place, bar.gone, "normal", fontsize=8.5, alpha=0.65)
            continue
        axes.barh(
            place, bar.value, height=0.66, linewidth=1.1, edgecolor=style.colour,
            color="none" if panel.printed else style.colour,
            xerr=bar.std or None, error_kw={"ecolor": INK, "elinewidth": 1, "capsize": 2},
        )  # fmt: skip
        weight = "bold" if place in strong else "normal"
        _beside(axes, bar.value + (bar.std or 0.0), place, f"{bar.value:.{digits}f}", weight, fontsize=9)
    axes.set_ylim(len(panel.bars) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)


def _beside(axes: Axes, value: float, place: int, text: str, weight: str, **font: Any) -> None:
    axes.annotate(
        text, (value, place), xytext=(4, 0), textcoords="offset points", va="center", fontweight=weight, **font
    )


def _write_name(axes: Axes, line: Line, printed: bool, *, both: bool, height: float) -> None:
    """Write whose numbers follow, and of which model, into the room that the titles leave: it may run over panels.

    Args:
        axes: the first panel.
        line: of the model.
        printed: the paper's numbers follow.
        both: ours and the paper's are in the figure.
        height: above the panel, in points.
    """
    name = papers.label("backbones", line.paper_backbone if printed else line.backbone)
    whose = ("Paper: " if printed else "Ours: ") if both else ""
    axes.annotate(
        whose + name, (0, 1), xytext=(0, height), xycoords="axes fraction", textcoords="offset points",
        fontsize=11, fontweight="bold",
    ).set_in_layout(False)  # fmt: skip
