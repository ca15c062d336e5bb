"""Progress of long work: a live view in a terminal, plain lines where there is none. Always on standard error."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

LINE_SECONDS = 10.0  # between two plain lines of one piece of work

console = Console(stderr=True, markup=False, emoji=False, highlight=False)


class Report(Protocol):
    """What `bar` gives: to be called as work goes on."""

    def __call__(self, done: int, total: int | None = None, note: str = "") -> None:
        """Show that `done` of `total` pieces are done."""


def say(text: str) -> None:
    """Print one line."""
    console.print(text, soft_wrap=True)


@contextmanager
def bar(title: str) -> Iterator[Report]:
    """Give a function `progress(done, total, note="")` to call as work goes on."""
    if console.is_terminal:
        name, note_column = TextColumn("{task.description}"), TextColumn("{task.fields[note]}")
        columns = (name, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), note_column)
        with Progress(*columns, console=console, transient=True) as live:
            task = live.add_task(title, total=None, note="")

            def show(done: int, total: int | None = None, note: str = "") -> None:
                live.update(task, completed=done, total=total, note=note)

            yield show
        return
    last = 0.0

    def line(done: int, total: int | None = None, note: str = "") -> None:
        nonlocal last
        now = time.monotonic()
        if done == total or now - last >= LINE_SECONDS:
            last = now
            print(f"{title}: {done}{f' of {total}' if total else ''} {note}".rstrip(), file=sys.stderr, flush=True)

    yield line
