"""What a stage asks of its driver process (`Work`), what they tell each other, and who hears what happens to trials."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from pipeline.core.errors import HificlError
from pipeline.records.journal import JournalEvent
from pipeline.records.trial import EpochReport

if TYPE_CHECKING:  # whoever reads messages needs neither torch nor a plan
    from pipeline.config.load import Params
    from pipeline.pool.slot import KeptSlots


PROXY_DIED = "the process that waits for it died"  # the trial itself may be well


@dataclass(frozen=True)
class TrialStarted:
    """A trial was taken up."""

    key: str


@dataclass(frozen=True)
class EpochEnded:
    """A trial completed an epoch."""

    key: str
    report: EpochReport


@dataclass(frozen=True)
class TrialEnded:
    """A trial ended: finished, diverged, stopped by the scheduler, or failed with `error`."""

    key: str
    error: str | None


@dataclass(frozen=True)
class Outcome:
    """What came of one piece of work, a result or an error."""

    key: str | int
    result: object


@dataclass(frozen=True)
class Alive:
    """The driver's sign of life."""


@dataclass(frozen=True)
class WorkEnded:
    """A work is done, and the next may come."""


@dataclass(frozen=True)
class WorkRefused:
    """The work could not be done, for a reason that a user can act on."""

    error: HificlError


@dataclass(frozen=True)
class WorkLost:
    """The driver or its cluster goes under; `trace` is for --debug."""

    why: str
    trace: str = ""


NO_MORE = b""  # in a work's place: what follows is `Stop`


@dataclass(frozen=True)
class Stop:
    """The stage's last word: end in order, within so many seconds with the last step kept."""

    seconds: float = 0.0


TrialMessage = TrialStarted | EpochEnded | TrialEnded
Result = TrialMessage | Outcome  # what work may tell
Message = Result | Alive | WorkEnded | WorkRefused | WorkLost
Tell = Callable[[Result], None]


class Watcher:
    """Hears what happens to the trials; what a watcher does not override does not concern it."""

    def hear(self, message: TrialMessage) -> None:
        """Take in one message."""
        match message:
            case TrialStarted(key):
                self.on_start(key)
            case EpochEnded(key, report):
                self.on_report(key, report)
            case TrialEnded(key, error):
                self.on_end(key, error)

    def on_start(self, key: str) -> None:
        """A trial was taken up."""

    def on_report(self, key: str, report: EpochReport) -> None:
        """A trial completed an epoch."""

    def on_end(self, key: str, error: str | None) -> None:
        """A trial ended: finished, diverged, stopped by the scheduler, or failed with `error`."""

    def on_event(self, event: JournalEvent) -> None:
        """Something went wrong in the sweep, or goes on again."""


class Work(Protocol):
    """A piece of work; it is sent to the driver whole."""

    params: Params

    def run(self, tell: Tell, kept: KeptSlots) -> None:
        """Do it on the current cluster, with slots of the works before, and tell what comes of it."""
