"""A figure as SVG text: text and axes in `currentColor`, so that it follows the page's dark mode, and with a size."""

from __future__ import annotations

import io
import re
from typing import Any, NamedTuple

from matplotlib.figure import Figure

QUIET = "#9aa5b1"
INK = "#010203"  # stands for currentColor, which Matplotlib cannot write: replaced in the SVG
_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', sans-serif"
_PIXELS = 96 / 72  # CSS pixels a point
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.size": 10,
    "font.family": "DejaVu Sans",
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
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


class Drawing(NamedTuple):
    """A figure as SVG text, and what it shows in words."""

    svg: str
    words: str


def to_svg(figure: Figure) -> str:
    """Return a figure as SVG text, its ink the page's, with a size in CSS pixels (a page may shrink it)."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = text.replace(INK, "currentColor").replace("'DejaVu Sans'", _FONT.replace("'", ""))
    head = re.search(r"<svg\b[^>]*>", text)
    assert head  # noqa: S101 - Matplotlib wrote it
    sized = re.sub(r'(width|height)="([\d.]+)pt"', lambda m: f'{m[1]}="{float(m[2]) * _PIXELS:.0f}"', head.group())
    return sized + text[head.end() :]


def standalone(svg: str) -> str:
    """Return an SVG with its own background and text colour, for a file that is opened by itself."""
    return re.sub(r"(<svg\b[^>]*>)", lambda tag: tag.group(1) + _STANDALONE, svg, count=1)


def safe(name: str) -> str:
    """Return `name` as part of a file's name."""
    return re.sub(r"[^A-Za-z0-9_.-]", "-", name)
