"""How figures are drawn: as SVG text that follows the page's dark mode; curves, ranges, tick labels, the legend."""

from __future__ import annotations

import colorsys
import functools
import hashlib
import io
import re
import textwrap
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
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
PrintedKind = Literal["pdf", "png"]
Fill = Literal["full", "none", "left", "bottom"]
PRINTED: tuple[PrintedKind, ...] = ("pdf", "png")
MARKERS = "os^DXPv<>hp*d8H"
# of series that are not methods, such as a miniature's losses by kind of document
SERIES = ("#1872f7", "#b15c08", "#2e9e7b", "#c234b5", "#336877", "#de8308", "#983648", "#9f97b9")
_SHADES = ((0.0, "white"), (0.45, "white"), (0.3, "black"))  # of a method's rows: its colour, lighter, darker
DASHES = ("-", "--", ":", "-.")
_FILLS: tuple[Fill, ...] = ("full", "none") * 3 + ("left", "bottom") * 3  # with the shades: twelve rows of a method
_LEAST_SPAN = 0.2  # of the highest value: what an axis shows at least, so that a small difference looks small
_LABEL = 34  # letters a line
_PANEL, _LETTER = 2.0, 0.11  # inches: a panel's least width, a letter's width in a tick label with its space


@dataclass(frozen=True)
class Drawing:
    """A figure in the report's style, and what it shows in words; drawn for each format that is asked for.

    Attributes:
        name: of the figure among all; the ids in its SVG come from it.
        draw: makes it.
        words: for who cannot see it.
    """

    name: str
    draw: Callable[[], Figure]
    words: str

    @functools.cached_property
    def svg(self) -> str:
        """SVG text, for the page."""
        with mpl.rc_context({**STYLE, "svg.hashsalt": self.name}):
            return to_svg(self.draw())

    def printed(self, kind: PrintedKind) -> bytes:
        """Return the figure for a paper: vectors with their fonts inside, or 300 dots an inch on white."""
        buffer = io.BytesIO()
        with mpl.rc_context({**STYLE, "pdf.fonttype": 42}):  # TrueType, which journals ask for
            nothing = {"Creator": None, "Producer": None, "CreationDate": None} if kind == "pdf" else {"Software": None}
            self.draw().savefig(buffer, format=kind, dpi=300, metadata=nothing)
        return buffer.getvalue()


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


Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Look:
    """How one row is drawn; the marker tells the methods apart where colours do not."""

    colour: str
    marker: str
    dash: str
    fill: Fill


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
    return Look(to_hex((red, green, blue)), marker, DASHES[turn % len(DASHES)], _FILLS[turn % len(_FILLS)])


def line(axes: Axes, xs: Sequence[Any], values: Sequence[float], spread: Sequence[float], look: Look) -> Any:
    """Draw one row's curve, its standard deviation over seeds as a band, and return its handle for the legend."""
    low = [value - std for value, std in zip(values, spread, strict=True)]
    high = [value + std for value, std in zip(values, spread, strict=True)]
    axes.fill_between(xs, low, high, color=look.colour, alpha=0.18, linewidth=0)
    (drawn,) = axes.plot(
        xs, values, color=look.colour, linestyle=look.dash, linewidth=1.7,
        marker=look.marker, markersize=5.5, fillstyle=look.fill,
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


def wrapped(text: str, letters: int = _LABEL) -> str:
    """Return a label on as many lines as it needs."""
    return "\n".join(textwrap.wrap(text, letters, break_on_hyphens=False)) or text
