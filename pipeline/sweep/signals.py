"""SIGINT and SIGTERM end a sweep in order, wherever they meet it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_heard: list[int] = []  # the signals of this block


@contextmanager
def as_interrupt() -> Iterator[None]:
    """Turn SIGINT and SIGTERM into KeyboardInterrupt for the time of the block.

    Python drops an exception that a handler raises while a finaliser or a weak reference's callback runs. So the signal
    is noted too, and the sweep's loop asks with `check` whether one was dropped.
    """

    def interrupt(number: int, *_: Any) -> None:
        _heard.append(number)
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _heard.clear()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:  # a shell ignores SIGINT for what it starts in the background
            signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)


def check() -> None:
    """Raise the KeyboardInterrupt of a signal whose own one was dropped."""
    if _heard:
        _heard.clear()
        raise KeyboardInterrupt
