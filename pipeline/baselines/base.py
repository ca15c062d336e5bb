"""The seam of the methods without training."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict

from pipeline.data.sample import Sample
from pipeline.registry import Registry


class Baseline(ABC):
    """One method without training."""

    class Options(BaseModel):
        """The method's own options; unknown ones are refused."""

        model_config = ConfigDict(extra="forbid", frozen=True)

    def __init__(self, options: BaseModel) -> None:
        self.options = options

    @abstractmethod
    def demonstrations(self, query: Sample, pool: Sequence[Sample], seed: int) -> list[Sample]:
        """Return the demonstrations of `query`, in prompt order; none of them has the query's id or image."""


baselines: Registry[type[Baseline]] = Registry("method without training", "pipeline.baselines")
