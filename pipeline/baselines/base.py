"""The seam of the methods without training."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from pipeline.adapters import options as _options
from pipeline.data.sample import Sample
from pipeline.registry import Registry


class Baseline(ABC):
    """One method without training."""

    Options: ClassVar[type[_options.Options]] = _options.Options

    def __init__(self, options: _options.Options) -> None:
        self.options = options

    @abstractmethod
    def demonstrations(self, query: Sample, pool: Sequence[Sample], seed: int) -> list[Sample]:
        """Return the demonstrations of `query`, in prompt order; none of them has the query's id or image."""


baselines: Registry[type[Baseline]] = Registry("method without training", "pipeline.baselines")
