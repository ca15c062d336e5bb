"""What a split is answered in: parts, on one machine or on several."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

SplitPart = tuple[int, int]  # (i, n): every n-th batch from the i-th on
WHOLE: SplitPart = (0, 1)


@dataclass(frozen=True)
class Answers:
    """What a trial answered in one part of a split.

    Attributes:
        texts: answer by sample id.
        seconds: the trial's share of what the part took.
        found: what a method without training found out first.
    """

    texts: dict[Any, str]
    seconds: float
    found: dict[str, Any] = field(default_factory=dict)
