"""Progress of long work: a live view in a terminal, plain lines where there is none. Always on standard error."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Protocol

from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

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


class Clock:
    """Says of work in parts, which has so many minutes, what it does now and how long it has left.

    A line as each part begins; and then, however little the part itself has to tell, one that moves under a terminal's
    other lines, or another line every `LINE_SECONDS`.

    Args:
        parts: how many there are.
        minutes: that the whole may take; None: that is not known.
    """

    def __init__(self, parts: int, minutes: float | None) -> None:
        self.parts, self.minutes, self.number = parts, minutes, 0
        self.started = time.monotonic()

    def spent(self) -> float:
        """Return the seconds since the start."""
        return time.monotonic() - self.started

    @contextmanager
    def part(self, title: str, *, live: bool = True) -> Iterator[None]:
        """Be in the next part inside the block; not `live`: another process draws in the terminal meanwhile."""
        self.number += 1
        name = f"{self.number} of {self.parts}, {title}"
        say(f"{name}: {self._left()}")
        if console.is_terminal:
            drawn = Live(console=console, transient=True, get_renderable=lambda: Text(f"{name}: {self._left()}"))
            with drawn if live else nullcontext():
                yield
            return
        over = threading.Event()

        def go_on() -> None:
            while not over.wait(LINE_SECONDS):
                print(f"{name}: {self._left()}", file=sys.stderr, flush=True)

        lines = threading.Thread(target=go_on, daemon=True)
        lines.start()
        try:
            yield
        finally:
            over.set()
            lines.join()

    def _left(self) -> str:
        spent = self.spent() / 60
        if self.minutes is None:
            return f"{spent:.1f} minutes so far"
        left = self.minutes - spent
        if left < 0:
            return f"{spent:.1f} minutes so far, {self.minutes:g} were asked for"
        return f"{left:.1f} of {self.minutes:g} minutes left"
