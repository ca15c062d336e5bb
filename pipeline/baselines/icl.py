"""In-context learning with k random demonstrations, drawn for every query by the seed."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field

from pipeline.adapters.options import Options
from pipeline.baselines.base import Baseline, baselines
from pipeline.data.prompt import draw_demos
from pipeline.data.sample import Sample


class IclOptions(Options):
    """How many demonstrations."""

    num_shots: int = Field(8, ge=1)


@baselines.register("icl-k")
class RandomDemonstrations(Baseline):
    """k demonstrations from the training pool, uniformly without replacement."""

    Options = IclOptions
    options: IclOptions

    def demonstrations(self, query: Sample, pool: Sequence[Sample], seed: int) -> list[Sample]:
        """Return `num_shots` samples of the pool, fixed by seed and query."""
        by_id = {sample.sample_id: sample for sample in pool}
        drawn = draw_demos(list(by_id), query.sample_id, self.options.num_shots, seed)
        return [by_id[sample_id] for sample_id in drawn]
