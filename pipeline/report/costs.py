"""What a row of a table took to train: the columns beside its scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

from pipeline.report.tables import Line, Table

_PREFIXES = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"))


@dataclass(frozen=True)
class Cost:
    """One column.

    Attributes:
        field: of a cell.
        title: head of the column.
        below: what the number is, in small print.
        text: what is shown for the values of a row's cells, of which there is one at least.
    """

    field: str
    title: str
    below: str
    text: Callable[[Sequence[float]], str]


def flops(value: float) -> str:
    """Return FLOPs with a prefix."""
    size, prefix = next(((size, prefix) for size, prefix in _PREFIXES if value >= size), (1.0, ""))
    return f"{value / size:.3g} {prefix}FLOP"


def memory(value: float) -> str:
    """Return bytes in MiB or GiB."""
    return f"{value / (1 << 30):.3g} GiB" if value >= 1 << 30 else f"{value / (1 << 20):,.0f} MiB"


def _range(values: Sequence[float]) -> str:
    return " - ".join(dict.fromkeys((f"{min(values):,.0f}", f"{max(values):,.0f}")))


COSTS = (
    Cost("trainable_parameters", "Trainable", "parameters", _range),
    Cost("train_seconds", "Training", "mean of a trial", lambda values: f"{fmean(values):,.1f} s"),
    Cost("train_flops", "FLOPs", "mean, by formula", lambda values: flops(fmean(values))),
    Cost("peak_memory_bytes", "Memory", "peak of a trial", lambda values: memory(max(values))),
)


def known(table: Table) -> list[Cost]:
    """Return the columns that have an entry."""
    return [cost for cost in COSTS if any(getattr(cell, cost.field) for cell in table.study.cells)]


def values(cost: Cost, table: Table, line: Line) -> list[float]:
    """Return what a row's cells have in one column, where they have something."""
    cells = [cell for entry in table.row(line) for cell in entry.cells]
    return [float(value) for value in (getattr(cell, cost.field) for cell in cells) if value]


def of_row(cost: Cost, table: Table, line: Line) -> str:
    """Return a row's entry in one column; nothing where nothing is known."""
    known_here = values(cost, table, line)
    return cost.text(known_here) if known_here else ""
