"""What a driver process does on its cluster, and what it tells its stage: training, scoring, measuring."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from pipeline.config.load import Params
from pipeline.core.errors import HificlError, WorkError
from pipeline.plan.plan import Plan
from pipeline.pool.messages import Answer, Tell
from pipeline.pool.units import Job

if TYPE_CHECKING:
    from pipeline.measure.base import Measure, MeasureJob


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
    """Trials to score; tells an `Answer` by evaluation key."""

    params: Params
    jobs: Sequence[Job]

    def run(self, tell: Tell) -> None:
        """See `Work`."""
        from pipeline.pool.evaluators import score_all

        for key, result in score_all(self.params, list(self.jobs)):
            tell(Answer(key, _sendable(result)))


@dataclass
class Measuring:
    """Groups of trials to measure; tells an `Answer` by the group's number: the numbers of each trial."""

    params: Params
    kind: Measure
    groups: dict[int, list[MeasureJob]]

    def run(self, tell: Tell) -> None:
        """See `Work`."""
        from pipeline.pool.evaluators import measure

        for number, jobs in self.groups.items():
            try:
                tell(Answer(number, measure(self.params, self.kind, jobs)))
            except Exception as error:  # the other groups are measured all the same
                tell(Answer(number, _sendable(error)))


def _sendable(result: object) -> object:
    """Return a result as it can be sent: an error of somebody's own class may not be."""
    if isinstance(result, BaseException) and not isinstance(result, HificlError):
        return WorkError(str(result) or type(result).__name__)
    return result
