"""Every error a user can meet: what is wrong, where, and the way out.

Exit status of the command line: 2 for bad input (`InputError`), 1 for a failure of work
(`WorkError` and everything unforeseen).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class HificlError(Exception):
    """Base of the project's own errors; its text is one line a user can act on."""

    exit_code = 1

    def __init__(self, what: str, *, where: str | None = None, way_out: str | None = None) -> None:
        self.what, self.where, self.way_out = what, where, way_out
        text = f"{where}: {what}" if where else what
        text = f"{text}. {way_out}" if way_out else text
        # A file can hold half of a surrogate pair, which no terminal or log takes.
        super().__init__(text.encode("utf-8", "backslashreplace").decode())

    def __reduce__(self) -> tuple[object, ...]:
        # Errors cross process borders (Ray); the keyword-only arguments must survive pickling.
        return _rebuild, (type(self), self.what, self.where, self.way_out)


def _rebuild(cls: type[HificlError], what: str, where: str | None, way_out: str | None) -> HificlError:
    return cls(what, where=where, way_out=way_out)


class InputError(HificlError):
    """The user's files, parameters or arguments are wrong; nothing was started."""

    exit_code = 2


class WorkError(HificlError):
    """Work that was started could not be finished; what had finished is kept."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return the sentence that helps with an unknown `name`: a suggestion and the full list."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"Did you mean '{close[0]}'? " if close else ""
    return f"{hint}Known: {', '.join(names) or '(none)'}"
