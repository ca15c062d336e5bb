"""In-context learning with k random demonstrations, drawn by the seed for every query or once for all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from pydantic import Field

from pipeline.baselines.base import Baseline, BaselineOptions, baselines
from pipeline.data.sample import Sample
from pipeline.prompts.prompt import draw_demos


class IclOptions(BaselineOptions):
    """How many demonstrations, and whether every query has its own.

    Fixed ones are computed once for all queries: their keys and values are kept (`pipeline.evaluate.prefix`).
    """

    num_shots: int = Field(8, ge=1)
    demonstrations: Literal["per-query", "fixed"] = "per-query"


@baselines.register
class RandomDemonstrations(Baseline):
    """k demonstrations from the training pool, uniformly without replacement."""

    name = "icl-k"
    Options: ClassVar[type[BaselineOptions]] = IclOptions
    shows_demonstrations = True
    options: IclOptions

    def demonstrations(self, queries: Sequence[Sample]) -> list[list[Sample]]:
        """Return `num_shots` samples of the pool for every query, by seed and query or by the seed alone."""
        if self.options.demonstrations == "fixed":
            return fixed(self.setting.pool, queries, self.options.num_shots, self.setting.seed)
        return [draw_from(self.setting.pool, query, self.options.num_shots, self.setting.seed) for query in queries]


def draw_from(pool: Sequence[Sample], query: Sample, num_shots: int, seed: int, *, draw: int | str = 0) -> list[Sample]:
    """Return `num_shots` samples of the pool for one query, never the query itself; see `draw_demos`."""
    by_id = {sample.sample_id: sample for sample in pool}
    return [by_id[i] for i in draw_demos(list(by_id), query.sample_id, num_shots, seed, draw=draw)]


def fixed(pool: Sequence[Sample], queries: Sequence[Sample], num_shots: int, seed: int) -> list[list[Sample]]:
    """Return the same `num_shots` samples of the pool for every query; one that is among the queries is not drawn."""
    asked = {query.sample_id for query in queries}
    by_id = {sample.sample_id: sample for sample in pool if sample.sample_id not in asked}
    drawn = [by_id[i] for i in draw_demos(list(by_id), "every query", num_shots, seed)]
    return [drawn for _ in queries]
