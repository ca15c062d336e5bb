"""How a miniature's pre-training went: losses, what it sees, and when in-context learning emerges."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from pipeline.report.panels import fit_range
from pipeline.report.svg import DASHES, QUIET, SERIES, STYLE, standalone, to_svg

RECORD = "pretraining.json"
LINES = {
    "seen": "right word, asked before",
    "unseen": "right word, not asked before",
    "right_value": "right value, any dialect",
}


def draw_emergence(folder: Path, out: Path) -> Path:
    """Write the figure of a pre-trained miniature as SVG.

    Args:
        folder: a checkpoint with `pretraining.json`.
        out: the file.
    """
    record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(10.5, 3.2), layout="constrained")
        vision, losses, emergence = figure.subplots(1, 3)
        _vision(vision, record["vision"])
        _losses(losses, record["decoder"])
        _emergence(emergence, record["decoder"])
        text = to_svg(figure)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(standalone(text), encoding="utf-8")
    return out


def _vision(axes: Axes, records: list[dict[str, Any]]) -> None:
    steps = [record["step"] for record in records]
    shares = [record["accuracy"] for record in records]
    axes.plot(steps, shares, color=SERIES[0], marker="o", markersize=3.5)
    fit_range(axes, min(shares), max(shares))
    _finish(axes, "Attributes named right", "vision step")


def _losses(axes: Axes, records: list[dict[str, Any]]) -> None:
    kinds = sorted({kind for record in records for kind in record["loss"]})
    for kind, colour, dash in zip(kinds, SERIES, DASHES, strict=False):
        points = [(record["step"], record["loss"][kind]) for record in records if kind in record["loss"]]
        axes.plot(*zip(*points, strict=True), color=colour, linestyle=dash, linewidth=1.5, label=kind)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("")
    axes.legend(fontsize=8)
    _finish(axes, "Loss (nats)", "decoder step")


def _emergence(axes: Axes, records: list[dict[str, Any]]) -> None:
    steps = [record["step"] for record in records]
    for (name, label), colour, dash in zip(LINES.items(), SERIES, DASHES, strict=False):
        axes.plot(steps, [r[name] for r in records], color=colour, linestyle=dash, linewidth=1.5, label=label)
    axes.set_ylim(0, 1.45)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1])
    axes.legend(fontsize=7.5, loc="upper left")
    _finish(axes, "In-context learning", "decoder step")


def _finish(axes: Axes, title: str, below: str) -> None:
    axes.set_title(title)
    axes.set_xlabel(below)
    axes.grid(axis="y", color=QUIET, alpha=0.3, linewidth=0.7)
