"""The progress of a sweep: what runs now and how far it is, what ended last, the best so far by task, time left."""

from __future__ import annotations

import sys
import threading
import time
from collections import Counter, defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.cells import cell_len
from rich.console import Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from pipeline.config.trial import TrialConfig
from pipeline.core.errors import HificlError
from pipeline.core.progress import console, say
from pipeline.core.terminal import BAD, QUIET, table
from pipeline.plan.plan import Plan
from pipeline.pool.messages import Watcher
from pipeline.records.journal import JournalEvent, sentence
from pipeline.records.store import TrialStore
from pipeline.records.trial import EpochReport
from pipeline.sweep.mlflow_sync import name_parts
from pipeline.tasks import tasks

LINE_SECONDS = 15.0
_REMEMBERED = 100  # trials that ended last
_FIXED = 24  # columns of a row beside its name
_ROWS = 4  # at least, before there is room for the best


@dataclass
class _Trial:
    """One trial as it is shown.

    Attributes:
        parts: what tells it apart from the others, by kind (`name_parts`).
        config: None: one that a searcher asked for, and that nobody knows yet.
        epoch: how many are behind it.
        score: the last on the selection split.
        state: done or failed; nothing while it runs.
    """

    parts: dict[str, str]
    config: TrialConfig | None
    epoch: int = 0
    score: float | None = None
    state: str = ""

    @property
    def name(self) -> str:
        """Its readable name among the others."""
        return " ".join(self.parts.values())

    @property
    def epochs(self) -> str:
        """The epoch that runs, or the last one, and of how many."""
        if self.config is None:
            return str(self.epoch)
        now = self.epoch if self.state else min(self.epoch + 1, self.config.epochs)
        return f"{now}/{self.config.epochs}"


@dataclass(frozen=True)
class _Best:
    """The best of a task: by its metric, or by the loss where that chooses."""

    metric: str
    objective: float
    row: str

    def __str__(self) -> str:
        return f"{self.metric} {abs(self.objective):.3g}"


class View(Watcher):
    """A live view in a terminal; lines elsewhere."""

    def __init__(self, plan: Plan, todo: Sequence[str], points: int = 0) -> None:
        self.plan, self.total = plan, len(todo) + points
        self.pace = TimeLeft({key: plan.trials[key] for key in todo}, points)
        self.shared, self._parts = _parts(plan, todo)
        self.ended, self.failed = 0, 0
        self.running: dict[str, _Trial] = {}
        self.last: deque[_Trial] = deque(maxlen=_REMEMBERED)
        self.best: dict[str, _Best] = {}
        self.last_line = 0.0
        self._lock = threading.Lock()  # the live view is drawn by a thread of its own
        live = Live(console=console, refresh_per_second=2, transient=True, get_renderable=self._drawn)
        self.live = live if console.is_terminal else None

    def __enter__(self) -> View:
        if self.live:
            self.live.start()
        self._say(force=True)
        return self

    def __exit__(self, *_: Any) -> None:
        if self.live:
            self.live.stop()
        print(self._line(), file=sys.stderr, flush=True)

    def on_start(self, key: str) -> None:
        """See `Watcher`."""
        with self._lock:
            self._trial(key)
        self._say()

    def on_event(self, event: JournalEvent) -> None:
        """Say what went wrong, and how it goes on."""
        if event.event not in ("slot built", "pack"):
            say(sentence(event.event, event.facts))

    def on_report(self, key: str, report: EpochReport) -> None:
        """See `Watcher`."""
        with self._lock:
            trial = self._trial(key)
            trial.epoch = report.epoch
            self.pace.on_epoch(key, trial.epoch, report.seconds or 0.0)
            if report.objective is not None:
                trial.score = abs(report.objective)  # a loss counts as its negative
                self._compare(trial, report.objective)
        self._say()

    def on_end(self, key: str, error: str | None) -> None:
        """See `Watcher`."""
        with self._lock:
            trial = self._trial(key)
            trial.state = "failed" if error is not None else "done"
            self.last.appendleft(self.running.pop(key))
            self.pace.on_end(key)
            self.ended += 1
            self.failed += error is not None
        if error is not None:
            named = f" ({trial.name})" if trial.name != key else ""
            print(f"trial {key}{named} failed: {error}", file=sys.stderr, flush=True)
        self._say()

    def _trial(self, key: str) -> _Trial:
        if key not in self.running:
            config = self.plan.trials.get(key) or self._asked(key)
            self.running[key] = _Trial(self._parts.get(key) or {"name": config.name if config else key}, config)
        trial = self.running[key]
        if trial.config is None and (config := self._asked(key)):
            trial.parts, trial.config = {"name": config.name}, config
        return trial

    def _asked(self, key: str) -> TrialConfig | None:
        """Return what a searcher asked for, once its slot has begun it."""
        try:
            return TrialStore(self.plan.places.runs).config(key)
        except HificlError:
            return None

    def _compare(self, trial: _Trial, objective: float) -> None:
        if trial.config is None:
            return
        task = trial.config.task
        metric = "loss" if trial.config.selection_metric == "loss" else tasks.get(task).metric
        if task not in self.best or objective > self.best[task].objective:
            row = " ".join(text for kind, text in trial.parts.items() if kind not in ("task", "study"))
            self.best[task] = _Best(metric, objective, row)

    def _left(self) -> str:
        seconds = self.pace.left()
        if seconds is None:
            return "?"
        return f"{seconds / 60:.0f} min" if seconds > 90 else f"{seconds:.0f} s"

    def _line(self) -> str:
        by_metric = {best.metric: best for best in sorted(self.best.values(), key=lambda best: best.objective)}
        said = [
            f"{self.ended} of {self.total} done",
            f"{self.failed} failed" if self.failed else "",
            f"{len(self.running)} running" if self.running else "",
            f"best {', '.join(map(str, by_metric.values()))}" if by_metric else "",
            f"{self._left()} left" if self.ended < self.total else "",
        ]
        return f"trials: {', '.join(filter(None, said))}"

    def _say(self, force: bool = False) -> None:
        now = time.monotonic()
        if self.live is None and (force or now - self.last_line > LINE_SECONDS or self.ended == self.total):
            self.last_line = now
            print(self._line(), file=sys.stderr, flush=True)

    def _drawn(self) -> RenderableType:
        with self._lock:
            best = [
                f"best {task}: {of_task} ({of_task.row})" if of_task.row else f"best {task}: {of_task}"
                for task, of_task in self.best.items()
            ]
            above: list[RenderableType] = [self._bar(), *([Text(self.shared, style=QUIET)] if self.shared else [])]
            room = console.height - 4 - _lines(self.shared, console.width)  # bar, heads, their line, the cursor's
            below = [Text(row, no_wrap=True, overflow="ellipsis") for row in best] if room - len(best) > _ROWS else []
            return Group(*above, self._rows(room - len(below)), *below)

    def _bar(self) -> Table:
        """Return how much is done: a trial that runs counts by its epochs."""
        known = ((trial.epoch, trial.config.epochs) for trial in self.running.values() if trial.config)
        halves = sum(epoch / epochs for epoch, epochs in known if epochs)
        row = Table.grid(expand=True, padding=(0, 1))
        row.add_column(ratio=1)
        row.add_column(no_wrap=True)
        said = Text(f"{self.ended} of {self.total}")
        if self.failed:
            said.append(f", {self.failed} failed", style=BAD)
        said.append(f", {self._left()} left")
        row.add_row(ProgressBar(total=max(1, self.total), completed=self.ended + halves), said)
        return row

    def _rows(self, room: int) -> RenderableType:
        """Return what runs, then what ended last, as far as there is room."""
        if not self.running and not self.last:
            return Text("Ray starts, and loads the backbone", style=QUIET)
        made = table("trial", "epoch", "score", "", right=("epoch", "score"))
        made.columns[0].no_wrap = False  # a long name takes two lines rather than lose what tells it apart
        width = max(8, console.width - _FIXED)
        for trial in [*self.running.values(), *self.last]:
            room -= _lines(trial.name, width)
            if room < 0:
                break
            score = "" if trial.score is None else f"{trial.score:.4g}"
            style = BAD if trial.state == "failed" else QUIET if trial.state else ""
            made.add_row(trial.name, trial.epochs, score, trial.state or "runs", style=style)
        return made


def _lines(text: str, width: int) -> int:
    """Return how many lines a text takes, no less than it will."""
    return -(-cell_len(text) // width)


def _parts(plan: Plan, todo: Sequence[str]) -> tuple[str, dict[str, dict[str, str]]]:
    """Return what all trials have in common, and what tells each apart, by kind; the study only where it has to."""
    parts = {key: name_parts(plan.cells[plan.cell_of[key]], plan.trials[key]) for key in todo if key in plan.cell_of}
    kinds = dict.fromkeys(kind for named in parts.values() for kind in named)
    values = {kind: dict.fromkeys(named.get(kind) for named in parts.values()) for kind in kinds}
    common = {kind for kind, seen in values.items() if len(seen) == 1}
    if len(parts) == 1:
        common -= {"task", "row"}  # a name is left
    without = {tuple(text for kind, text in named.items() if kind != "study") for named in parts.values()}
    if len(without) == len(parts):
        common.add("study")
    shared = [", ".join(map(str, seen)) for kind, seen in values.items() if kind in common]
    apart = {key: {kind: text for kind, text in named.items() if kind not in common} for key, named in parts.items()}
    return "; ".join(shared), apart


EpochKind = tuple[str, str, int]  # backbone, method, shots of its teacher: what an epoch's seconds a sample depend on


class TimeLeft:
    """The time left, `elapsed * W / D`.

    D are the seconds of the epochs seen; W those that the epochs to come would take, each at its kind's seconds a
    sample (a kind not seen yet: at the mean of all), and those of the points that a searcher will still ask for, each
    as the ones that have ended. What lies between `elapsed` and D, slots side by side, packs, a teacher's pass before
    the first epoch, is taken to go on as it was.

    Args:
        trials: those to be trained, by key.
        points: how many more a searcher will ask for.
    """

    def __init__(self, trials: Mapping[str, TrialConfig], points: int = 0) -> None:
        self._trials, self._points = trials, points
        self._open = {key: config.epochs for key, config in trials.items()}
        self._left: Counter[EpochKind] = Counter()  # samples to come, once an epoch
        for config in trials.values():
            self._left[_kind(config)] += config.epochs * config.num_train_samples
        self._samples: dict[EpochKind, int] = defaultdict(int)
        self._seconds: dict[EpochKind, float] = defaultdict(float)
        self._asked: dict[str, float] = defaultdict(float)  # seconds of the points asked for, and of those that ended
        self._ended: list[float] = []
        self._started: float | None = None

    def on_epoch(self, key: str, epoch: int, seconds: float) -> None:
        """Take in what the epoch `epoch` (from 1) of a trial took.

        The clock runs from where the first of them began: a cluster's start and a backbone's loading come once.
        """
        if self._started is None:
            self._started = time.monotonic() - seconds
        config = self._trials.get(key)
        if config is None:
            self._asked[key] += seconds
            return
        self._samples[_kind(config)] += config.num_train_samples
        self._seconds[_kind(config)] += seconds
        self._close(key, max(0, config.epochs - epoch))

    def on_end(self, key: str) -> None:
        """Count no further epochs of a trial."""
        if key in self._trials:
            self._close(key, 0)
        else:
            self._ended.append(self._asked[key])

    def left(self) -> float | None:
        """Return the seconds to go; None while too little was seen to tell."""
        trained = sum(self._seconds.values())
        spent = trained + sum(self._asked.values())
        to_ask = max(0, self._points - len(self._ended))
        samples = sum(self._samples.values())
        if self._started is None or not spent or (to_ask and not self._ended) or (self._trials and not samples):
            return None
        to_come = sum(
            count * (self._seconds[kind] / self._samples[kind] if self._samples[kind] else trained / samples)
            for kind, count in self._left.items()
        )
        if to_ask:
            to_come += to_ask * sum(self._ended) / len(self._ended)
        return (time.monotonic() - self._started) / spent * to_come

    def _close(self, key: str, epochs: int) -> None:
        config = self._trials[key]
        closed, self._open[key] = self._open[key] - epochs, epochs
        self._left[_kind(config)] -= closed * config.num_train_samples


def _kind(config: TrialConfig) -> EpochKind:
    return config.backbone, config.method, config.num_shots
