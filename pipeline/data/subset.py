"""Which samples of the training split a trial gets."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline.data.manifest import Manifest
    from pipeline.data.sample import Sample
    from pipeline.trial import TrialConfig


def training_samples(manifest: Manifest, config: TrialConfig) -> Sequence[Sample]:
    """Return the `num_train_samples` samples that a trial trains on and draws demonstrations from.

    They are in the split's order. `sample_draw: first` takes the first ones, the same for every seed. `by-seed` draws
    them by the trial's seed, so that a spread over seeds has that of the sample in it; a smaller draw lies within a
    larger one of the same seed.
    """
    split = manifest.splits["train"]
    if config.sample_draw == "first":
        return split[: config.num_train_samples]
    drawn = list(range(len(split)))
    random.Random(f"sample_draw/{config.seed}").shuffle(drawn)
    return [split[i] for i in sorted(drawn[: config.num_train_samples])]
