"""Bars of a study on one backbone, the paper's hollow below ours; one quantity has one axis, which begins at 0."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

from pipeline.report import papers
from pipeline.report.drawing import INK, QUIET, Look, looks, metric_words, wrapped
from pipeline.report.tables import Column, Line, Table, TableEntry

_ACROSS = 4  # panels in a row at most
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
    made = Figure(
        figsize=(beside + max(1.75, min(3.6, 5.4 / across)) * across, 0.3 + (0.8 + tall) * len(rows)),
        layout=ConstrainedLayoutEngine(h_pad=0.07, w_pad=0.05),
    )
    grid = made.subplots(len(rows), across, squeeze=False)
    ends: dict[tuple[bool, str], float] = {}
    for panel in (panel for row in rows for panel in row):
        ends[panel.quantity] = max(ends.get(panel.quantity, 0.0), panel.end)
    look = looks(table, lambda line: (line.row, line.vary))
    styles = [look[line.row, line.vary] for line in lines]
    strong = {place for place, line in enumerate(lines) if line.row == table.reference and len(lines) > 1}
    reference = next((line.label for line in lines if line.row == table.reference), "")
    for place, (axes_row, row) in enumerate(zip(grid, rows, strict=True)):
        begins = place == 0 or rows[place - 1][0].printed != row[0].printed
        for axes, panel in zip(axes_row, row, strict=False):
            _bars(axes, panel, styles, ends[panel.quantity] or 1.0, strong)
            task = papers.label("tasks", panel.column.paper_task if panel.printed else panel.column.task)
            title = f"{task}\n{metric_words(panel.entry, reference)}"
            axes.set_title("\n\n" * begins + title, fontweight="normal", fontsize=9.5)
            axes.set_yticks(range(len(lines)), titles if axes is axes_row[0] else [""] * len(lines))
        for axes in axes_row[len(row) :]:
            axes.set_axis_off()
        if begins:
            _name(axes_row[0], lines[0], row[0].printed, both=rows[-1][0].printed)
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


def _name(axes: Axes, line: Line, printed: bool, *, both: bool) -> None:
    """Write whose numbers follow, and of which model, into the room that the titles leave: it may run over panels."""
    name = papers.label("backbones", line.paper_backbone if printed else line.backbone)
    whose = ("Paper: " if printed else "Ours: ") if both else ""
    axes.annotate(
        whose + name, (0, 1), xytext=(0, 33), xycoords="axes fraction", textcoords="offset points",
        fontsize=11, fontweight="bold",
    ).set_in_layout(False)  # fmt: skip
