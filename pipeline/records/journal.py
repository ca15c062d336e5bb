"""`runs/journal.jsonl`: what happened to a sweep, a line an event, whoever wrote it."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, Field, JsonValue

from pipeline.core.errors import InputError
from pipeline.core.progress import say
from pipeline.records import Json, Number, Record

_LONGEST = 200  # characters of a fact in a sentence


class Journal:
    """Appends events and reads new ones, with `whole` also those that are there already."""

    def __init__(self, root: Path | str, *, whole: bool = False) -> None:
        self.path = Path(root) / "journal.jsonl"
        self._seen = self.path.stat().st_size if self.path.exists() and not whole else 0

    def note(self, event: str, **facts: Any) -> None:
        """Append an event; a disk that is full must not end the sweep that says so."""
        line = JournalEvent(time=round(time.time(), 3), event=event, **facts).text(indent=None)
        try:
            with self.path.open("ab+") as file:
                file.seek(max(0, file.tell() - 1))
                torn = file.read() not in (b"", b"\n")  # by a full disk, or a crash in the middle of a line
                file.write(("\n" * torn + line + "\n").encode())
        except OSError:
            pass

    def news(self) -> list[JournalEvent]:
        """Return the events since this journal was opened or last asked, whoever wrote them, but for damaged ones."""
        if not self.path.exists() or self.path.stat().st_size <= self._seen:
            return []
        with self.path.open("rb") as file:
            file.seek(self._seen)
            text = file.read()
        whole = text[: text.rfind(b"\n") + 1]
        self._seen += len(whole)
        events = []
        for line in filter(bytes.strip, whole.split(b"\n")):
            try:
                events.append(JournalEvent.parse(line, str(self.path), ""))
            except InputError as error:
                begun = line[:40].decode(errors="replace")
                say(f"note: {self.path} has a damaged line, which is passed over: {begun!r} ({error.what})")
        return events


def sentence(event: str, facts: Mapping[str, Any]) -> str:
    """Return an event with its facts in one line, with the beginning of what others say (Ray says pages)."""
    whole = {name: str(value) for name, value in facts.items()}
    begun = {name: text.partition("\n")[0][:_LONGEST] for name, text in whole.items()}
    more = " (all of it in runs/journal.jsonl)" if begun != whole else ""
    return f"{event}: " + ", ".join(f"{name} {text}" for name, text in begun.items()) + more


class JournalEvent(Record):
    """One event. Its facts stand beside `time` and `event`, and each kind of event has its own.

    Attributes:
        time: in seconds since 1970.
        event: what happened.
    """

    model_config = ConfigDict(extra="allow", frozen=True)
    __pydantic_extra__: dict[str, JsonValue] = Field(init=False)

    time: Number
    event: str

    @property
    def facts(self) -> Json:
        """What is known of it, by name."""
        return self.__pydantic_extra__

    def number(self, fact: str) -> float:
        """Return a fact that is a number; NaN where it is none."""
        value = self.facts.get(fact)
        return float(value) if isinstance(value, int | float) else math.nan
