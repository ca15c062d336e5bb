"""A signal ends a sweep also where Python drops the exception that its handler raises."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from pipeline.pool.processes import ENDING, KEEP_SECONDS, KEEPING, as_interrupt, keep_seconds, raise_dropped_interrupt


@pytest.fixture(autouse=True)
def _as_from_a_terminal() -> Iterator[None]:
    """Let no signal be ignored, as SIGHUP is where the suite itself was started by nohup."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in (*ENDING, KEEPING)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


class Finalised:
    """Gets a signal while Python takes it down."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __del__(self) -> None:
        os.kill(os.getpid(), self.number)


@pytest.mark.parametrize("number", [*ENDING, KEEPING])
@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")  # nor is it printed
def test_a_signal_in_a_finaliser_is_not_lost(number: int) -> None:
    before = signal.getsignal(number)
    with as_interrupt():
        dropped = Finalised(number)
        del dropped  # KeyboardInterrupt is raised in it, and dropped
        with pytest.raises(KeyboardInterrupt):
            raise_dropped_interrupt()
        raise_dropped_interrupt()  # once
    assert signal.getsignal(number) is before


@pytest.mark.parametrize("number", [*ENDING, KEEPING])
def test_a_signal_is_an_interrupt(number: int) -> None:
    with pytest.raises(KeyboardInterrupt), as_interrupt():
        os.kill(os.getpid(), number)
    with as_interrupt():
        raise_dropped_interrupt()  # the next sweep has nothing to do with it


def test_what_was_started_to_ignore_a_signal_goes_on_ignoring_it():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
    try:
        with as_interrupt():
            os.kill(os.getpid(), signal.SIGHUP)
            raise_dropped_interrupt()
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_of_the_signals_one_gives_time_to_keep_the_last_step(monkeypatch):
    monkeypatch.setenv(KEEP_SECONDS, "70")
    for number, seconds in ((KEEPING, 70.0), (signal.SIGTERM, 0.0)):
        with pytest.raises(KeyboardInterrupt), as_interrupt():
            os.kill(os.getpid(), number)
        assert keep_seconds() == seconds
