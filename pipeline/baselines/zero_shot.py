"""Zero-shot: the query alone."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.baselines.base import Baseline, baselines
from pipeline.data.sample import Sample


@baselines.register("zero-shot")
class ZeroShot(Baseline):
    """No demonstrations, the frozen model as it is."""

    def demonstrations(self, query: Sample, pool: Sequence[Sample], seed: int) -> list[Sample]:
        """Return none."""
        return []
