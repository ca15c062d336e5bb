"""A line of `runs/journal.jsonl`: what went wrong in a sweep, and how it went on."""

from __future__ import annotations

import math

from pydantic import ConfigDict, Field, JsonValue

from pipeline.records.base import Json, Number, Record


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
