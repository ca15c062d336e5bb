"""Methods that train nothing: what they put before the query, or into the model."""

from __future__ import annotations

from pipeline.baselines.base import Baseline, baselines

__all__ = ["Baseline", "baselines"]
