"""What a program writes between two marks of a document that people write."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from pipeline.atomic import write_atomic
from pipeline.errors import InputError


def fill(path: Path, marks: re.Pattern[str], way_out: str, made: Callable[[re.Match[str]], str | None]) -> int:
    """Replace what stands between marks by what `made` gives for each; where that is None it stays. Return how many.

    Args:
        path: the document.
        marks: matches from an opening mark to its closing one, as groups `open` and `close`.
        way_out: how marks are written, for the error.
        made: called with each match.

    Raises:
        InputError: the document is missing or has no such marks, or as `made`.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"not readable: {error.strerror}", where=str(path)) from None
    if not marks.search(text):
        raise InputError("has no marks to write between", where=str(path), way_out=way_out)
    written = 0

    def put(match: re.Match[str]) -> str:
        nonlocal written
        found = made(match)
        if found is None:
            return match[0]
        written += 1
        return f"{match['open']}\n{found}\n{match['close']}"

    filled = marks.sub(put, text)
    write_atomic(path, filled)
    return written
