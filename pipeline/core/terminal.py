"""How a command's answer reaches standard output: as tables for people, or as JSON for programs."""

from __future__ import annotations

import json
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline.core.errors import WorkError

if TYPE_CHECKING:  # a pipe needs none of it
    from rich.console import RenderableType
    from rich.table import Table

GOOD, BAD, QUIET = "green", "bold red", "dim"  # Rich's names of styles


class Answer(ABC):
    """What a command found; `print_answer` prints it."""

    @abstractmethod
    def record(self) -> Any:
        """Return it as JSON has it."""

    @abstractmethod
    def shown(self) -> Iterable[RenderableType]:
        """Give it as lines and tables, top to bottom."""

    @property
    def problem(self) -> str | None:
        """What is not in order, for which the command ends with status 1."""
        return None


@dataclass(frozen=True)
class Fields(Answer):
    """Names and values, nested as they may be: for answers that are no table."""

    values: Mapping[str, Any]
    wrong: str | None = None

    def record(self) -> Any:
        """Return them."""
        return self.values

    def shown(self) -> Iterator[RenderableType]:
        """Give a line a value."""
        yield from _lines(self.values)

    @property
    def problem(self) -> str | None:
        """What is `wrong`."""
        return self.wrong


@dataclass(frozen=True)
class Rows(Answer):
    """A list of records of one kind; `columns` are the fields that the table shows, and its heads for them."""

    rows: Sequence[Mapping[str, Any]]
    columns: Mapping[str, str]

    def record(self) -> list[Any]:
        """Return the records."""
        return list(self.rows)

    def shown(self) -> Iterator[RenderableType]:
        """Give one table."""
        numbers = [head for field, head in self.columns.items() if self.rows and _is_number(self.rows[0].get(field))]
        made = table(*self.columns.values(), right=numbers)
        for row in self.rows:
            made.add_row(*(short(row.get(field)) for field in self.columns))
        yield made


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _lines(facts: Mapping[str, Any], indent: str = "") -> Iterator[RenderableType]:
    width = max((len(str(name)) for name in facts), default=0) + 2
    for name, value in facts.items():
        if isinstance(value, Mapping) and value:
            yield f"{indent}{name}"
            yield from _lines(value, f"{indent}  ")
        elif isinstance(value, list) and len(value) > 1:
            yield from (f"{indent}{name if not at else '':{width}}{short(entry)}" for at, entry in enumerate(value))
        else:
            yield f"{indent}{name:{width}}{short(value[0] if isinstance(value, list) and value else value)}"


def short(value: Any) -> str:
    """Return a value as people read it: no more digits than say something, nothing for nothing."""
    if value is None or value in ({}, []):
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        parts = ((name, short(inner), isinstance(inner, Mapping)) for name, inner in value.items())
        return " ".join(f"{name}({text})" if nested else f"{name}={text}" for name, text, nested in parts)
    if isinstance(value, list | tuple):
        return ",".join(map(short, value))
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def table(*columns: str, right: Iterable[str] = (), title: str | None = None) -> Table:
    """Return an empty table: heads with a line below them, no frame, `right` the columns of numbers.

    The first column names the rows: it, and numbers, are never broken.
    """
    from rich import box
    from rich.table import Table

    made = Table(
        box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False, pad_edge=False, title=title,
        title_justify="left", title_style="bold", header_style="bold",
    )  # fmt: skip
    numbers = set(right)
    for column in columns:
        whole = column in numbers or column == columns[0]
        made.add_column(column, justify="right" if column in numbers else "left", no_wrap=whole, overflow="fold")
    return made


def print_answer(answer: Any, form: str | None = None) -> None:
    """Print what a command returned.

    Args:
        answer: an `Answer`, or what is JSON as it stands; None: nothing.
        form: "json" or "table"; None: a table where standard output is a terminal, JSON where it is not.

    Raises:
        WorkError: the answer's `problem`, once it is printed.
    """
    if not isinstance(answer, Answer):
        if answer is not None:
            _write_json(answer)
        return
    if form == "table" or (form is None and sys.stdout.isatty()):
        from rich.console import Console

        console = Console(file=sys.stdout, markup=False, emoji=False, highlight=False)
        for part in answer.shown():
            console.print(part, soft_wrap=isinstance(part, str))  # a path is copied whole
    else:
        _write_json(answer.record())
    sys.stdout.flush()
    if answer.problem:
        raise WorkError(answer.problem)


def _write_json(value: Any) -> None:
    text = json.dumps(value, indent=1, ensure_ascii=False, default=str)
    # Half of a surrogate pair, which no terminal takes, becomes the escape that JSON has for it.
    print(text.encode("utf-8", "backslashreplace").decode())
