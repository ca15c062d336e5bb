"""Zero-shot: the query alone."""

from __future__ import annotations

from pipeline.baselines.base import Baseline, baselines


@baselines.register
class ZeroShot(Baseline):
    """No demonstrations, the frozen model as it is."""

    name = "zero-shot"
