"""Checks of what was recorded against what is there, each once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pipeline.config.trial import KEY_LENGTH, EvaluationConfig, TrialConfig, digest
from pipeline.core.plain_yaml import Json

SAME, DIFFERS, MISSING, UNRECORDED = "same", "differs", "missing", "not recorded"


@dataclass(frozen=True)
class Check:
    """One comparison.

    Attributes:
        what: what is compared ("adapter", "source file").
        where: the file or the run.
        expected: what was recorded.
        found: what is there.
        state: same, differs, missing or not recorded.
    """

    what: str
    where: str
    expected: str | None
    found: str | None
    state: str

    def sentence(self) -> str:
        """Return what is wrong, in one line."""
        if self.state == MISSING:
            return f"{self.what} {self.where} is missing{f' ({self.found})' if self.found else ''}"
        return f"{self.what} {self.where} is {_short(self.found)}, {_short(self.expected)} was recorded"


class Checks:
    """Collects checks; one that several seeds share is made once."""

    def __init__(self) -> None:
        self._made: dict[tuple[str, str, str | None], Check] = {}

    def compare(self, what: str, where: Path | str, expected: Any, found: Any | Callable[[], Any]) -> Check:
        """Compare `found` (or what it returns) with what was recorded; None found means it is not there."""
        wanted = None if expected is None else str(expected)
        key = (what, str(where), wanted)
        if key not in self._made:
            value = found() if callable(found) else found
            seen = None if value is None else str(value)
            if wanted is None:
                state = UNRECORDED if seen is not None else MISSING
            else:
                state = MISSING if seen is None else SAME if seen == wanted else DIFFERS
            self._made[key] = Check(what, str(where), wanted, seen, state)
        return self._made[key]

    def add(self, check: Check) -> Check:
        """Take up a check that was made elsewhere."""
        return self._made.setdefault((check.what, check.where, check.expected), check)

    @property
    def wrong(self) -> list[Check]:
        """The checks that found something missing or different."""
        return [check for check in self._made.values() if check.state in (DIFFERS, MISSING)]

    @property
    def made(self) -> list[Check]:
        """All of them, in the order in which they were made."""
        return list(self._made.values())


def _short(text: str | None) -> str:
    return str(text) if text is None or len(text) <= 80 else f"{text[:77]}..."


def key_of(kind: type[TrialConfig] | type[EvaluationConfig], stored: Json, stated: str) -> str:
    """Return the key of a stored configuration.

    Code of its own time hashed it as it stands, newer code leaves out later fields at their defaults: where one of the
    two gives `stated`, that is its key.
    """
    plain = digest(stored)[:KEY_LENGTH]
    if plain == stated:
        return plain
    try:
        return kind.model_validate(stored).key
    except ValidationError:
        return plain
