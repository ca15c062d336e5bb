"""How many trials Tune has in progress: enough for the packs, and no more processes than a head can hold."""

from __future__ import annotations

import pytest

from pipeline.schema import Sweep
from pipeline.sweep.tuner import most_in_progress


@pytest.mark.parametrize(
    ("pack", "gpus", "slots", "most"),
    [(1, 0, 2, 4), ("auto", 0, 2, 10), (3, 0, 1, 4), ("auto", 1, 8, 68), ("auto", 1, 64, 132), ("auto", 1, 512, 516)],
)
def test_packs_are_filled_as_far_as_the_head_can_hold(pack, gpus, slots, most):
    assert most_in_progress(Sweep(pack=pack, gpus_per_worker=gpus), slots) == most
