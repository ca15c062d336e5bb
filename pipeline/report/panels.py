"""What the panels of all figures share: a curve with its spread, the range of the y axis, tick labels, the legend."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from pipeline.report import papers
from pipeline.report.svg import Look
from pipeline.report.tables import TableEntry

_LEAST_SPAN = 0.2  # of the highest value: what an axis shows at least, so that a small difference looks small
_LABEL = 34  # letters a line
_PANEL, _LETTER = 2.0, 0.11  # inches: a panel's least width, a letter's width in a tick label with its space


def line(axes: Axes, xs: Sequence[Any], values: Sequence[float], spread: Sequence[float], look: Look) -> Any:
    """Draw one row's curve, its standard deviation over seeds as a band, and return its handle for the legend."""
    low = [value - std for value, std in zip(values, spread, strict=True)]
    high = [value + std for value, std in zip(values, spread, strict=True)]
    axes.fill_between(xs, low, high, color=look.colour, alpha=0.18, linewidth=0)
    face = look.colour if look.filled else "none"
    (drawn,) = axes.plot(
        xs, values, color=look.colour, linestyle=look.dash, linewidth=1.7,
        marker=look.marker, markersize=5.5, markerfacecolor=face,
    )  # fmt: skip
    return drawn


def fit_range(axes: Axes, low: float, high: float) -> None:
    """Set the y axis: from 0 where the values reach far down, else at least a fifth of the highest value."""
    if 0 <= low < high / 2 or low == high == 0:
        axes.set_ylim(0, high * 1.06 or 1.0)
        return
    span = max(high - low, _LEAST_SPAN * abs(high))
    axes.set_ylim(high - span * 1.06, high + span * 0.06)


def spaced(axes: Axes, xs: Sequence[float], labels: Sequence[str]) -> list[str]:
    """Return the labels of an x axis, empty where one would run into the next; the last one stays."""
    axes.get_xlim()  # settles the limits, which transData takes as they are
    inches = axes.transAxes.inverted().transform(axes.transData.transform([(at, 0.0) for at in xs]))[:, 0] * _PANEL
    kept, left = list(labels), float("inf")
    for place in range(len(labels) - 1, -1, -1):
        half = _LETTER * len(labels[place]) / 2
        if inches[place] + half > left:
            kept[place] = ""
        else:
            left = inches[place] - half
    return kept


def legend(figure: Figure, handles: Mapping[str, Any]) -> None:
    """Put a legend below the panels, in as many columns as the figure is wide, and make the figure higher by it."""
    labels = [wrapped(label) for label in handles]
    renderer = FigureCanvasAgg(figure).get_renderer()
    for columns in range(min(4, len(labels)), 0, -1):
        made = figure.legend(handles.values(), labels, loc="outside lower center", ncols=columns, fontsize=9)
        size = made.get_window_extent(renderer)
        if columns == 1 or size.width <= figure.bbox.width:
            figure.set_figheight(figure.get_figheight() + size.height / figure.dpi)
            return
        made.remove()


def wrapped(text: str) -> str:
    """Return a label on as many lines as it needs."""
    return "\n".join(textwrap.wrap(text, _LABEL, break_on_hyphens=False)) or text


def metric_words(entry: TableEntry, reference: str = "") -> str:
    """Return the name of an entry's metric with its unit; a factor's with what it is a factor of."""
    sign = f"× {reference}" if entry.unit == "times" and reference else papers.sign(entry.unit)
    return papers.label("metrics", entry.metric) + (f" ({sign})" if sign else "")
