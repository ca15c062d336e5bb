"""The figures of the report as SVG: ours beside the paper's, and curves over a varied axis.

Text and axes are drawn in `currentColor`, so that a figure follows the page into the dark.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from pipeline.errors import InputError
from pipeline.report import papers
from pipeline.report.tables import Column, Entry, Line, Table

# legible on white and on near-black alike; the reference row has the first one
ACCENT = "#2f7ed8"
COLOURS = ("#d9792b", "#2fa36b", "#a566c9", "#c94f6d", "#8a8f98", "#b59b1e", "#2aa5b5")
QUIET = "#9aa5b1"
_INK = "#010203"  # a colour nobody chooses: replaced by currentColor
_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', sans-serif"
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.size": 10,
    "font.family": "DejaVu Sans",
    "text.color": _INK,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "xtick.major.size": 3,
    "axes.axisbelow": True,
    "text.parse_math": False,  # a dollar sign in a name is no formula
}
_STANDALONE = (
    "<style>svg{color:#1d2430;background:#fff}"
    "@media (prefers-color-scheme:dark){svg{color:#e4e8ee;background:#12161c}}</style>"
)


def draw(table: Table, layout: str) -> dict[str, tuple[str, str]]:
    """Return a study's figures: name -> (SVG text, what it shows in words)."""
    if table.axes and layout != "table":
        axis = max(table.axes, key=lambda name: len({dict(line.vary).get(name) for line in table.lines}))
        return {f"over-{safe(axis)}": (_curves(table, axis), _curve_words(table, axis))}
    return {
        f"bars-{safe(backbone)}": (_bars(table, lines), _bar_words(table, lines))
        for backbone, lines in table.groups()
        if any(entry.value is not None for line in lines for entry in table.row(line))
    }


def standalone(svg: str) -> str:
    """Return an SVG that has its own ground and ink, for a file that is looked at alone."""
    return re.sub(r"(<svg\b[^>]*>)", lambda found: found.group(1) + _STANDALONE, svg, count=1)


def hero(table: Table, out: Path, backbone: str | None = None) -> list[Path]:
    """Write the README's picture of a study: SVG for both schemes and a PNG on white.

    Args:
        table: the study, laid out.
        out: the file's path without suffix, such as docs/images/result.
        backbone: which group of lines; None: the first with numbers.

    Returns:
        The files written.

    Raises:
        InputError: the study has no number to show.
    """
    groups = [
        (name, lines)
        for name, lines in table.groups()
        if backbone in (None, name) and any(entry.value is not None for line in lines for entry in table.row(line))
    ]
    if not groups:
        raise InputError("no cell with a number", where=table.study.study, way_out="Run dvc repro first")
    out.parent.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context({**STYLE, "svg.hashsalt": out.name}):
        figure = _bar_figure(table, groups[0][1], wide=True)
        svg, png = out.with_suffix(".svg"), out.with_suffix(".png")
        svg.write_text(standalone(to_svg(figure)), encoding="utf-8")
        figure.savefig(
            png, dpi=160, facecolor="white", bbox_inches="tight", pad_inches=0.15, metadata={"Software": None}
        )
    return [svg, png]


def _bars(table: Table, lines: Sequence[Line]) -> str:
    with mpl.rc_context({**STYLE, "svg.hashsalt": f"{table.study.study} {lines[0].backbone}"}):
        return to_svg(_bar_figure(table, lines))


def _bar_figure(table: Table, lines: Sequence[Line], wide: bool = False) -> Figure:
    """One panel a column of the table, ours beside (or, wide, above) the paper's figures, each on its own scale."""
    columns = [c for c in table.columns if any(table.entries[line, c].value is not None for line in lines)]
    printed = any(table.entries[line, c].paper is not None for line in lines for c in columns)
    ways = 2 if printed else 1
    panel_height = 0.45 + 0.27 * len(lines)
    size = (
        (3.7 * len(columns) + 0.6, 0.3 + ways * (panel_height + 0.3))
        if wide
        else (7.6, 0.55 + len(columns) * panel_height)
    )
    figure = Figure(figsize=size, layout=ConstrainedLayoutEngine(h_pad=0.09, w_pad=0.06))
    grid = figure.subplots(*((ways, len(columns)) if wide else (len(columns), ways)), squeeze=False)
    for place, column in enumerate(columns):
        entries = [table.entries[line, column] for line in lines]
        panels = grid[:, place] if wide else grid[place]
        _panel(panels[0], lines, [(e.value, e.std) for e in entries], entries[0], table.reference, hollow=False)
        _name_panel(panels[0], column.task, entries[0], "Ours", lines[0].backbone, first=place == 0)
        if printed:
            _panel(panels[1], lines, [(e.paper, None) for e in entries], entries[0], table.reference, hollow=True)
            _name_panel(panels[1], column.paper_task, entries[0], "Paper", lines[0].paper_backbone, first=place == 0)
        for panel in panels if wide and place else panels[1:] if not wide else ():
            panel.set_yticklabels([])
    return figure


def _beside(axes: Axes, value: float, place: int, text: str, **font: Any) -> None:
    axes.annotate(text, (value, place), xytext=(4, 0), textcoords="offset points", va="center", **font)


def _name_panel(axes: Axes, task: str, entry: Entry, whose: str, backbone: str, *, first: bool) -> None:
    unit = papers.sign(entry.unit)
    metric = papers.label("metrics", entry.metric) + (f" ({unit})" if unit else "")
    axes.set_title(f"{papers.label('tasks', task)}, {metric}", fontweight="normal")
    if first:
        axes.annotate(
            f"{whose}: {papers.label('backbones', backbone)}",
            (0, 1),
            xytext=(0, 24),
            xycoords="axes fraction",
            textcoords="offset points",
            fontsize=11.5,
            fontweight="bold",
        )


def _panel(
    axes: Axes,
    lines: Sequence[Line],
    values: Sequence[tuple[float | None, float | None]],
    entry: Entry,
    reference: str | None,
    *,
    hollow: bool,
) -> None:
    places = range(len(lines))
    known = [value for value, _ in values if value is not None]
    top = max((value + (std or 0.0) for value, std in values if value is not None), default=1.0)
    axes.set_xlim(min(0.0, *known) if known else 0.0, top * 1.24 if top > 0 else 1.0)
    digits = papers.decimals(entry.unit)
    digits = min(digits, 1) if entry.unit == "percent" else digits
    for place, line, (value, std) in zip(places, lines, values, strict=True):
        if value is None:
            _beside(axes, 0, place, "not printed" if hollow else "no number", fontsize=8.5, alpha=0.65)
            continue
        colour = ACCENT if line.row == reference else QUIET
        axes.barh(
            place,
            value,
            height=0.66,
            color="none" if hollow else colour,
            edgecolor=colour,
            linewidth=1.1,
            xerr=std if std else None,
            error_kw={"ecolor": _INK, "elinewidth": 1, "capsize": 2},
        )
        bold = "bold" if line.row == reference else "normal"
        _beside(axes, value + (std or 0.0), place, f"{value:.{digits}f}", fontsize=9, fontweight=bold)
    axes.set_yticks(list(places), [line.title for line in lines])
    axes.set_ylim(len(lines) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.spines["bottom"].set_visible(False)
    axes.set_xticks([])


def _curves(table: Table, axis: str) -> str:
    groups = table.groups()
    columns = [c for c in table.columns if any(table.entries[line, c].value is not None for line in table.lines)]
    wide = max(1, len(columns))
    with mpl.rc_context({**STYLE, "svg.hashsalt": f"{table.study.study} {axis}"}):
        size = (max(4.2, min(8.4, 3.4 * wide)), 0.4 + 2.9 * len(groups))
        figure = Figure(figsize=size, layout=ConstrainedLayoutEngine(w_pad=0.12))
        grid = figure.subplots(len(groups), wide, squeeze=False)
        handles: dict[str, Any] = {}
        for panels, (backbone, lines) in zip(grid, groups, strict=True):
            for panel, column in zip(panels, columns, strict=False):
                _curve_panel(panel, table, lines, column, axis, handles)
                name = papers.label("tasks", column.task)
                panel.set_title(f"{name}\n{papers.label('backbones', backbone)}")
        if len(handles) > 1:
            figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=min(4, len(handles)))
        return to_svg(figure)


def _curve_panel(
    panel: Axes, table: Table, lines: Sequence[Line], column: Column, axis: str, handles: dict[str, Any]
) -> None:
    names = list(dict.fromkeys((line.row, _rest(line, axis)) for line in table.lines))
    others = iter(range(10**6))
    colours = {
        name: ACCENT if name[0] == table.reference or len(names) == 1 else COLOURS[next(others) % len(COLOURS)]
        for name in names
    }
    numeric = True
    points: dict[tuple[str, tuple[tuple[str, Any], ...]], list[tuple[Any, Entry]]] = {}
    for line in lines:
        entry = table.entries[line, column]
        at = dict(line.vary).get(axis)
        numeric = numeric and isinstance(at, int | float) and not isinstance(at, bool)
        if entry.value is not None and at is not None:
            points.setdefault((line.row, _rest(line, axis)), []).append((at, entry))
    ticks = sorted({at for row in points.values() for at, _ in row}, key=lambda v: (0, v) if numeric else (1, str(v)))
    for name, row in points.items():
        row.sort(key=lambda point: ticks.index(point[0]))
        where = [at if numeric else ticks.index(at) for at, _ in row]
        values = [entry.value or 0.0 for _, entry in row]
        spread = [entry.std or 0.0 for _, entry in row]
        colour = colours[name]
        strong = name[0] == table.reference
        low = [v - s for v, s in zip(values, spread, strict=True)]
        high = [v + s for v, s in zip(values, spread, strict=True)]
        panel.fill_between(where, low, high, color=colour, alpha=0.18, linewidth=0)
        (drawn,) = panel.plot(where, values, color=colour, marker="o", markersize=4.5, linewidth=2.2 if strong else 1.5)
        label = ", ".join([row[0][1].line.label, *(f"{key} = {value}" for key, value in name[1])])
        handles.setdefault(label, drawn)
    if numeric and ticks and min(ticks) > 0 and max(ticks) / min(ticks) >= 8:
        panel.set_xscale("log")
    panel.minorticks_off()
    panel.set_xticks([at if numeric else i for i, at in enumerate(ticks)], [f"{at}" for at in ticks])
    panel.set_xlabel(papers.label("axes", axis))
    entry = table.entries[lines[0], column]
    unit = papers.sign(entry.unit)
    panel.set_ylabel(papers.label("metrics", entry.metric) + (f" ({unit})" if unit else ""))
    panel.grid(axis="y", color=QUIET, alpha=0.3, linewidth=0.7)


def _rest(line: Line, axis: str) -> tuple[tuple[str, Any], ...]:
    return tuple(pair for pair in line.vary if pair[0] != axis)


def _bar_words(table: Table, lines: Sequence[Line]) -> str:
    rows = []
    for column in table.columns:
        shown = [table.entries[line, column] for line in lines]
        parts = [f"{e.line.title} {e.value:.{papers.decimals(e.unit)}f}" for e in shown if e.value is not None]
        name = f"{papers.label('tasks', column.task)} {papers.label('metrics', shown[0].metric)}"
        rows.append(f"{name}: {', '.join(parts)}")
    return f"Bars on {papers.label('backbones', lines[0].backbone)}, ours beside the paper's. {'; '.join(rows)}."


def _curve_words(table: Table, axis: str) -> str:
    rows = list(dict.fromkeys(line.label for line in table.lines))
    tasks = list(dict.fromkeys(papers.label("tasks", column.task) for column in table.columns))
    over = papers.label("axes", axis)
    return f"Score over {over} for {', '.join(rows)} on {', '.join(tasks)}, with the spread over seeds."


def to_svg(figure: Figure) -> str:
    """Return a figure as SVG text without a size of its own, its ink the page's."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = text.replace(_INK, "currentColor").replace("'DejaVu Sans'", _FONT.replace("'", ""))
    # a width in points would keep the figure from shrinking with the page; viewBox is enough
    return re.sub(r"<svg\b[^>]*>", lambda head: re.sub(r' (width|height)="[^"]*"', "", head.group()), text, count=1)


def safe(name: str) -> str:
    """Return `name` as part of a file's name."""
    return re.sub(r"[^A-Za-z0-9_.-]", "-", name)
