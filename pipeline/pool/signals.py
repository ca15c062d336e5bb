"""SIGINT, SIGTERM and the death of dvc end a stage in order, wherever they meet it."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from pipeline.pool.processes import PARENT_SECONDS, alive

_heard: list[int] = []  # the signals of this block


@contextmanager
def in_order() -> Iterator[None]:
    """End the block with KeyboardInterrupt at SIGINT, at SIGTERM, and when the `dvc` above this process is gone."""
    with as_interrupt(), _ended_with_parent():
        yield


@contextmanager
def as_interrupt() -> Iterator[None]:
    """Turn SIGINT and SIGTERM into KeyboardInterrupt for the time of the block.

    Python drops an exception that a handler raises while a finaliser or a weak reference's callback runs. So the signal
    is noted too, and the sweep's loop asks with `check` whether one was dropped.
    """

    def interrupt(number: int, *_: Any) -> None:
        _heard.append(number)
        raise KeyboardInterrupt

    with kept() as handlers:
        _heard.clear()
        for number, handler in handlers.items():
            if handler is not signal.SIG_IGN:  # a shell ignores SIGINT for what it starts in the background
                signal.signal(number, interrupt)
        yield


@contextmanager
def kept() -> Iterator[dict[int, Any]]:
    """Put the handlers of SIGINT and SIGTERM back at the end of the block, whoever sets others in it.

    Yields:
        The handlers by signal; none outside the main thread, where nobody may set any.
    """
    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield dict(before)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)


def check() -> None:
    """Raise the KeyboardInterrupt of a signal whose own one was dropped."""
    if _heard:
        _heard.clear()
        raise KeyboardInterrupt


@contextmanager
def _ended_with_parent() -> Iterator[None]:
    """End this process when the `dvc` above it is killed, which would leave it as an orphan beside a second sweep."""
    ancestors = psutil.Process().parents()
    dvc = next((p for p in ancestors if any("dvc" in Path(part).name for part in _cmdline(p)[:3])), None)
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(PARENT_SECONDS):
            if dvc is not None and not alive(dvc):
                os.kill(os.getpid(), signal.SIGTERM)
                return

    if dvc is not None:
        threading.Thread(target=watch, daemon=True, name="watch-dvc").start()
    try:
        yield
    finally:
        stop.set()


def _cmdline(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []
