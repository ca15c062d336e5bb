"""What a method looks like: one colour and one marker in every figure of every study."""

from __future__ import annotations

import colorsys
import functools
import hashlib
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import TypeVar

from matplotlib.colors import to_hex, to_rgb

from pipeline.report import papers
from pipeline.report.tables import Line, Table

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
