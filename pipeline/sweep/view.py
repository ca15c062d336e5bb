"""The progress of a sweep: trials done and running, the best score of each cell so far, time left."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any

from rich.live import Live
from rich.table import Table

from pipeline.progress import console, say
from pipeline.sweep.journal import sentence
from pipeline.sweep.pace import Pace
from pipeline.sweep.plan import Plan

LINE_SECONDS = 15.0


class View:
    """A live table in a terminal; lines elsewhere."""

    def __init__(self, plan: Plan, todo: Sequence[str], points: int = 0) -> None:
        self.plan, self.total = plan, len(todo) + points
        self.pace = Pace({key: plan.trials[key] for key in todo}, points)
        self.ended, self.failed = 0, 0
        self.running: set[str] = set()
        self.best: dict[str, float] = {}
        self.last_line = 0.0
        self.live = Live(console=console, refresh_per_second=2, transient=True) if console.is_terminal else None

    def __enter__(self) -> View:
        if self.live:
            self.live.start()
        self._show(force=True)
        return self

    def __exit__(self, *_: Any) -> None:
        if self.live:
            self.live.stop()
        print(self._line(), file=sys.stderr, flush=True)

    def on_start(self, key: str) -> None:
        """See `tuner.Watcher`."""
        self.running.add(key)
        self._show()

    def on_event(self, row: dict[str, Any]) -> None:
        """Say what went wrong, and how it goes on."""
        if row["event"] != "slot built":
            say(sentence(row))

    def on_report(self, key: str, report: dict[str, Any]) -> None:
        """See `tuner.Watcher`."""
        if report.get("seconds") is not None:  # an error has none
            self.pace.on_epoch(key, int(report["epoch"]), float(report["seconds"]))
        cell = self.plan.cell_of.get(key)
        score = report.get("objective")
        if cell is not None and score is not None:
            self.best[cell] = max(score, self.best.get(cell, score))
        self._show()

    def on_end(self, key: str, error: str | None) -> None:
        """See `tuner.Watcher`."""
        self.running.discard(key)
        self.pace.on_end(key)
        self.ended += 1
        self.failed += error is not None
        if error is not None:
            print(f"trial {key} failed: {error}", file=sys.stderr, flush=True)
        self._show()

    def _left(self) -> str:
        seconds = self.pace.left()
        if seconds is None:
            return "?"
        return f"{seconds / 60:.0f} min" if seconds > 90 else f"{seconds:.0f} s"

    def _line(self) -> str:
        failed = f", {self.failed} failed" if self.failed else ""
        best = f", best so far {max(self.best.values()):.3g}" if self.best else ""
        return (
            f"trials: {self.ended} of {self.total} done{failed}, {len(self.running)} running{best}, {self._left()} left"
        )

    def _show(self, force: bool = False) -> None:
        if self.live is None:
            now = time.monotonic()
            if force or now - self.last_line > LINE_SECONDS or self.ended == self.total:
                self.last_line = now
                print(self._line(), file=sys.stderr, flush=True)
            return
        table = Table(title=self._line(), title_justify="left", box=None)
        table.add_column("cell")
        table.add_column("best so far", justify="right")
        for cell, score in sorted(self.best.items())[-20:]:
            table.add_row(cell, f"{score:.4g}")
        self.live.update(table)
