"""In-context learning with k random demonstrations, drawn for every query by the seed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field

from pipeline.baselines.base import Baseline, BaselineOptions, baselines
from pipeline.data.prompt import draw_demos
from pipeline.data.sample import Sample


class IclOptions(BaselineOptions):
    """How many demonstrations."""

    num_shots: int = Field(8, ge=1)


@baselines.register("icl-k")
class RandomDemonstrations(Baseline):
    """k demonstrations from the training pool, uniformly without replacement."""

    Options: ClassVar[type[BaselineOptions]] = IclOptions
    shows_demonstrations = True
    options: IclOptions

    def demonstrations(self, queries: Sequence[Sample]) -> list[list[Sample]]:
        """Return `num_shots` samples of the pool for every query, fixed by seed and query."""
        return [draw_from(self.setting.pool, query, self.options.num_shots, self.setting.seed) for query in queries]


def draw_from(pool: Sequence[Sample], query: Sample, num_shots: int, seed: int, *, draw: int | str = 0) -> list[Sample]:
    """Return `num_shots` samples of the pool for one query, never the query itself; see `draw_demos`."""
    by_id = {sample.sample_id: sample for sample in pool}
    return [by_id[i] for i in draw_demos(list(by_id), query.sample_id, num_shots, seed, draw=draw)]
