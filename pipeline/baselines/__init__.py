"""Methods that train nothing: what they put before the query, or into the model."""

from __future__ import annotations

from pipeline.baselines.base import Baseline, BaselineOptions, Setting, baselines

__all__ = ["Baseline", "BaselineOptions", "Setting", "baselines"]
