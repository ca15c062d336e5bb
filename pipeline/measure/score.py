"""The score itself, and a study that is looked at rather than counted."""

from __future__ import annotations

from pipeline.measure.base import Measure, measures


@measures.register("score")
class Score(Measure):
    """The task's own score; nothing is measured beside it."""


@measures.register("qualitative")
class Qualitative(Measure):
    """Answers side by side (layout `gallery`); the score stands with them."""
