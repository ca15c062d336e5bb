"""The learning-rate schedule and the number of steps."""

from __future__ import annotations

import math


def steps_per_epoch(num_samples: int, batch_size: int) -> int:
    """Return the number of optimiser steps in an epoch; the last one may be smaller than the rest."""
    return math.ceil(num_samples / batch_size)


def cosine_with_warmup(step: int, total: int, warmup_ratio: float) -> float:
    """Return the factor on the learning rate at optimiser step `step` (0-based) of `total`.

    Linear from 0 over the first `warmup_ratio` of the steps, then half a cosine down to 0 (HiFICL Table 5).
    The first step already moves: it takes 1/warm-up of the rate, where a start at exactly 0 would waste it.
    """
    warmup = math.ceil(total * warmup_ratio)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))
