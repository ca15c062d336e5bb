"""The miniature in pictures: how its pre-training went, and a sheet of its world with what is asked about each."""

from __future__ import annotations

import json
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.image as mpimg
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from pipeline.report.drawing import DASHES, QUIET, SERIES, STYLE, fit_range, standalone, to_svg

RECORD = "pretraining.json"
LINES = {
    "seen": "right word, asked before",
    "unseen": "right word, not asked before",
    "right_value": "right value, any dialect",
    "signed": "right word, two groups of annotators",
    "signed_shuffled": "the same, images shuffled",
}
COLUMNS, ROWS = 4, 2


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
    measured = {name: label for name, label in LINES.items() if name in records[0]}
    for (name, label), colour, dash in zip(measured.items(), SERIES, cycle(DASHES), strict=False):
        axes.plot(steps, [r[name] for r in records], color=colour, linestyle=dash, linewidth=1.5, label=label)
    axes.set_ylim(0, 1.15 + 0.1 * len(measured))
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1])
    axes.legend(fontsize=7.5, loc="upper left")
    _finish(axes, "In-context learning", "decoder step")


def _finish(axes: Axes, title: str, below: str) -> None:
    axes.set_title(title)
    axes.set_xlabel(below)
    axes.grid(axis="y", color=QUIET, alpha=0.3, linewidth=0.7)


def draw_world(world: Path, out: Path) -> Path:
    """Write the first pictures of a world (`write_world`) with their questions, answers and captions as PNG.

    Args:
        world: its folder.
        out: the file.
    """

    def read(name: str, part: str) -> dict[int, dict]:
        entries = json.loads((world / name).read_text(encoding="utf-8"))[part]
        first: dict[int, dict] = {}
        for entry in entries:
            first.setdefault(entry["image_id"], entry)
        return first

    asked = read("v2_OpenEnded_mscoco_train2014_questions.json", "questions")
    answered = read("v2_mscoco_train2014_annotations.json", "annotations")
    captions = read("annotations/captions_train2014.json", "annotations")
    figure = Figure(figsize=(9.5, 6.2), layout="constrained")
    panels = figure.subplots(ROWS, COLUMNS).flatten()
    for panel, image in zip(panels, sorted(asked), strict=False):
        panel.imshow(mpimg.imread(world / f"train2014/COCO_train2014_{image:012d}.png"), interpolation="nearest")
        panel.set_axis_off()
        words = captions[image]["caption"].split()
        half = (len(words) + 1) // 2
        caption = " ".join(words[:half]) + "\n" + " ".join(words[half:])
        answer = answered[image]["multiple_choice_answer"]
        panel.set_title(f"{asked[image]['question']} {answer}\n{caption}", fontsize=7.5)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110, metadata={"Software": None})
    return out
