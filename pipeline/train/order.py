"""Which samples a step sees, as a pure function of seed and epoch: a resumed trial sees the same."""

from __future__ import annotations

import numpy as np


def epoch_order(num_samples: int, seed: int, epoch: int) -> np.ndarray:
    """Return the permutation of `range(num_samples)` of one epoch, [num_samples].

    Philox is counter-based and its stream is fixed by numpy's stability policy, so the order is the same on every
    machine.
    """
    generator = np.random.Generator(np.random.Philox(key=[seed & 0xFFFFFFFF, epoch]))
    return generator.permutation(num_samples)


def batches(num_samples: int, batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """Split one epoch's order into global batches (over all ranks and accumulation steps)."""
    order = epoch_order(num_samples, seed, epoch).tolist()
    return [order[i : i + batch_size] for i in range(0, num_samples, batch_size)]


def share_of(batch: list[int], *, micro_batch_size: int, world_size: int, rank: int) -> list[list[int]]:
    """Return the micro-batches of `rank` in a global batch.

    Samples are dealt to the ranks in turn, so that a short last batch is spread evenly. Every rank gets the same
    number of micro-batches (some may be empty), because the ranks must meet at the same collectives.
    """
    mine = batch[rank::world_size]
    longest = -(-len(batch) // world_size)
    count = max(1, -(-longest // micro_batch_size))
    return [mine[i * micro_batch_size : (i + 1) * micro_batch_size] for i in range(count)]
