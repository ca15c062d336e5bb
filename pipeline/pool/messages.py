"""What a stage asks of its driver process (`Work`), what they tell each other, and who hears what happens to trials."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from pipeline.core.errors import HificlError, WorkError
from pipeline.records.journal import JournalEvent
from pipeline.records.trial import EpochReport

if TYPE_CHECKING:  # whoever reads messages needs neither torch nor a plan
    from pipeline.config.load import Params
    from pipeline.measure import Measure, MeasureJob
    from pipeline.plan.plan import Plan
    from pipeline.pool.evaluation_calls import Job


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
    """All work is done."""


@dataclass(frozen=True)
class WorkRefused:
    """The work could not be done, for a reason that a user can act on."""

    error: HificlError


@dataclass(frozen=True)
class WorkLost:
    """The driver or its cluster goes under; `trace` is for --debug."""

    why: str
    trace: str = ""


@dataclass(frozen=True)
class Stop:
    """The stage's only word after the work: end in order."""


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

    def run(self, tell: Tell) -> None:
        """Do it on the current cluster, and tell what comes of it."""


@dataclass
class Training:
    """The trials `keys` of a plan, and the points that a searcher asks for; tells what becomes of them."""

    plan: Plan
    keys: list[str]
    params: Params

    def run(self, tell: Tell) -> None:
        """See `Work`."""
        from pipeline.pool.tuner import run_trials

        run_trials(self.plan, self.keys, self.params, tell)


@dataclass
class Scoring:
    """Trials to score; tells an `Outcome` by evaluation key."""

    params: Params
    jobs: Sequence[Job]

    def run(self, tell: Tell) -> None:
        """See `Work`."""
        from pipeline.pool.evaluators import score_on_cluster

        for key, result in score_on_cluster(self.params, list(self.jobs)):
            tell(Outcome(key, _sendable(result)))


@dataclass
class Measuring:
    """Groups of trials to measure; tells an `Outcome` by the group's number: the numbers of each trial."""

    params: Params
    kind: Measure
    groups: dict[int, list[MeasureJob]]

    def run(self, tell: Tell) -> None:
        """See `Work`."""
        from pipeline.pool.evaluators import measure_on_cluster

        for number, jobs in self.groups.items():
            try:
                tell(Outcome(number, measure_on_cluster(self.params, self.kind, jobs)))
            except Exception as error:  # the other groups are measured all the same
                tell(Outcome(number, _sendable(error)))


def _sendable(result: object) -> object:
    """Return a result as it can be sent: an error of somebody's own class may not be."""
    if isinstance(result, BaseException) and not isinstance(result, HificlError):
        return WorkError(str(result) or type(result).__name__)
    return result
