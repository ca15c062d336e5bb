"""A figure as SVG text: text and axes in `currentColor`, so that it follows the page's dark mode, and with a size."""

from __future__ import annotations

import colorsys
import functools
import hashlib
import io
import re
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure

from pipeline.report import papers
from pipeline.report.tables import Line, Table

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


MARKERS = "os^DXPv<>hp*d8H"
# of series that are not methods, such as a miniature's losses by kind of document
SERIES = ("#1872f7", "#b15c08", "#2e9e7b", "#c234b5", "#336877", "#de8308", "#983648", "#9f97b9")
_SHADES = ((0.0, "white"), (0.45, "white"), (0.3, "black"))  # of a method's rows: its colour, lighter, darker
DASHES = ("-", "--", ":", "-.")
Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Look:
    """How one row is drawn.

    Attributes:
        colour: as hexadecimal digits.
        marker: Matplotlib's sign for it; it tells the methods apart where colours do not.
        dash: Matplotlib's line style.
        filled: whether the marker is.
    """

    colour: str
    marker: str
    dash: str
    filled: bool


@functools.cache
def of_method(name: str) -> tuple[str, str]:
    """Return a method's colour and marker: those in labels.yaml, else ones computed from its name."""
    known = papers.method_look(name)
    if known:
        return known.colour, known.marker
    digest = hashlib.sha256(name.encode()).digest()
    hue, saturation, value = digest[0] / 256, 0.5 + digest[1] / 1024, 0.6 + digest[2] / 1024
    return to_hex(colorsys.hsv_to_rgb(hue, saturation, value)), MARKERS[digest[3] % len(MARKERS)]


def looks(table: Table, key: Callable[[Line], Key]) -> dict[Key, Look]:
    """Return how each row of a study is drawn; rows of the same method are shades of its colour, dashed in turn.

    Args:
        table: the study.
        key: what of a line is one row, as its name without the axis that the figure runs along.
    """
    methods = {cell.row: cell.method for cell in table.study.cells}
    backbones: dict[Key, set[str]] = {}
    for line in table.lines:
        backbones.setdefault(key(line), set()).add(line.backbone)
    turns: dict[Key, tuple[str, int]] = {}
    for line in sorted(table.lines, key=lambda line: line.row != table.reference):  # it gets the colour itself
        row = key(line)
        if row not in turns:  # the first shade that no other row of the method has on the same backbone
            method = methods[line.row]
            same = [(earlier, turn) for earlier, (name, turn) in turns.items() if name == method]
            taken = {turn for earlier, turn in same if backbones[earlier] & backbones[row]}
            turns[row] = method, next(turn for turn in range(len(taken) + 1) if turn not in taken)
    return {row: _look(*turn) for row, turn in turns.items()}


def _look(method: str, turn: int) -> Look:
    colour, marker = of_method(method)
    share, toward = _SHADES[turn % len(_SHADES)]
    red, green, blue = (a + share * (b - a) for a, b in zip(to_rgb(colour), to_rgb(toward), strict=True))
    return Look(to_hex((red, green, blue)), marker, DASHES[turn % len(DASHES)], filled=turn % 2 == 0)
