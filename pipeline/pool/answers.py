"""Scores and measures trials with a driver, and with another one where it is lost; this process never imports Ray."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from pipeline.config.load import Params
from pipeline.core.progress import say
from pipeline.pool.messages import Answer, Measuring, Scoring, Work
from pipeline.pool.supervisor import Attempts, Driver, Lost
from pipeline.pool.units import Job
from pipeline.records.evaluation import Evaluation
from pipeline.records.journal import sentence

if TYPE_CHECKING:
    from pipeline.measure import Measure, MeasureJob


def score_all(
    params: Params, jobs: Sequence[Job], first: Driver | None = None
) -> Iterator[tuple[str, Evaluation | Exception]]:
    """Yield (evaluation key, evaluation or error) in the order of completion; `first` is a driver that runs already.

    Raises:
        InputError: as the driver's.
        WorkError: the driver was lost `sweep.retry.max_attempts` times, with no score in between.
    """

    def left(done: set[Any]) -> Work | None:
        rest = [job for job in jobs if job[1].key not in done]
        return Scoring(params, rest) if rest else None

    yield from _answers(left, params, first)


def measure_all(params: Params, kind: Measure, groups: Sequence[list[MeasureJob]]) -> Iterator[tuple[int, Any]]:
    """Yield (number of the group, numbers of each of its trials or error).

    Raises:
        InputError, WorkError: as `score_all`.
    """

    def left(done: set[Any]) -> Work | None:
        rest = {number: jobs for number, jobs in enumerate(groups) if number not in done}
        return Measuring(params, kind, rest) if rest else None

    yield from _answers(left, params, None)


def _answers(
    left: Callable[[set[Any]], Work | None], params: Params, first: Driver | None
) -> Iterator[tuple[Any, Any]]:
    """Yield what the work that is `left` when these keys are done tells of each of its keys."""
    done: set[Any] = set()
    attempts = Attempts(params, "evaluate", _note)
    while (work := left(done)) is not None:
        driver, first, before = first or Driver(), None, len(done)
        lost = Lost("it ended before its work")
        try:
            for message in driver.messages(work):
                if isinstance(message, Answer):
                    done.add(message.key)
                    yield message.key, message.result
        except Lost as error:
            lost = error
        finally:
            driver.end()
        if left(done) is not None:
            attempts.lost(lost, progress=len(done) > before)


def _note(event: str, **facts: Any) -> None:
    say(sentence(event, facts))
