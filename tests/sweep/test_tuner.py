"""How many trials Tune has in progress, and for how long a scheduler lets one train."""

from __future__ import annotations

import pytest

from pipeline.config import load
from pipeline.schema import Sweep
from pipeline.sweep.forecast import as_given
from pipeline.sweep.plan import make_plan, places
from pipeline.sweep.schedule import make_scheduler
from pipeline.sweep.space import cells
from pipeline.sweep.tuner import most_in_progress
from tests.conftest import ROOT


@pytest.mark.parametrize(
    ("pack", "gpus", "slots", "most"),
    [(1, 0, 2, 4), ("auto", 0, 2, 10), (3, 0, 1, 4), ("auto", 1, 8, 68), ("auto", 1, 64, 132), ("auto", 1, 512, 516)],
)
def test_packs_are_filled_as_far_as_the_head_can_hold(pack, gpus, slots, most):
    assert most_in_progress(Sweep(pack=pack, gpus_per_worker=gpus), slots) == most


@pytest.mark.parametrize("search", ["grid", "optuna"])
@pytest.mark.parametrize("epochs", [3, 20])
def test_asha_ends_a_trial_where_its_epochs_end_whether_or_not_its_point_is_known_beforehand(search, epochs):
    settings = [f"train.epochs={epochs}", f"sweep.search={search}", "sweep.scheduler=asha"]
    params = load(ROOT / "params.yaml", settings)
    plan = make_plan(params, cells(params, "miniature-search", as_given(params)), places())
    assert make_scheduler(params, plan)._make()._max_t == epochs
