"""Which samples a step sees, and its learning rate: pure functions of seed, epoch and step, the same after a resume."""

from __future__ import annotations

import math

import numpy as np


def steps_per_epoch(num_samples: int, batch_size: int) -> int:
    """Return the number of optimiser steps in an epoch; the last one may be smaller than the rest."""
    return math.ceil(num_samples / batch_size)


def cosine_with_warmup(step: int, total: int, warmup_ratio: float) -> float:
    """Return the scale on the learning rate at optimiser step `step` (0-based) of `total`.

    Linear from 0 over the first `warmup_ratio` of the steps, then half a cosine down to 0 (HiFICL Table 5).
    The first step already moves: it takes 1/warm-up of the rate, where a start at exactly 0 would waste it.
    """
    warmup = math.ceil(total * warmup_ratio)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def epoch_order(num_samples: int, seed: int, epoch: int) -> np.ndarray:
    """Return the permutation of `range(num_samples)` of one epoch, [num_samples].

    Philox is counter-based and its stream is fixed by numpy's stability policy, so the order is the same on every
    machine.
    """
    generator = np.random.Generator(np.random.Philox(key=[seed & 0xFFFFFFFF, epoch]))
    return generator.permutation(num_samples)


def global_batches(num_samples: int, batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """Split one epoch's order into global batches (over all ranks and accumulation steps)."""
    order = epoch_order(num_samples, seed, epoch).tolist()
    return [order[i : i + batch_size] for i in range(0, num_samples, batch_size)]


def micro_batches_of_rank(
    global_batch: list[int], *, micro_batch_size: int, world_size: int, rank: int
) -> list[list[int]]:
    """Return the micro-batches of `rank` in a global batch.

    Samples are dealt to the ranks in turn, so that a short last batch is spread evenly. Every rank gets the same
    number of micro-batches (some may be empty), because the ranks must meet at the same collectives.
    """
    of_rank = global_batch[rank::world_size]
    longest = -(-len(global_batch) // world_size)
    count = max(1, -(-longest // micro_batch_size))
    return [of_rank[i * micro_batch_size : (i + 1) * micro_batch_size] for i in range(count)]
