"""How many trials Tune has in progress, and for how long a scheduler lets one train."""

from __future__ import annotations

import pytest

from pipeline.config.load import load
from pipeline.config.schema import Sweep
from pipeline.core.errors import InputError
from pipeline.plan.plan import as_given, make_plan, places
from pipeline.plan.space import cells
from pipeline.pool.processes import NODES_SECONDS
from pipeline.pool.schedule import make_scheduler
from pipeline.pool.tuner import by_world_size, count_slots, most_in_progress
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


RANKED = (
    "studies.ranked={title: r, backbones: [idefics2-8b-base], tasks: [vqav2], vary: {world_size: [1, 2]}, "
    "methods: {live: {}, hificl: {search: {rank: [1, 2]}}}}"
)


def test_a_search_trains_on_as_many_ranks_as_its_own_cell_asks_for():
    params = load(ROOT / "params.yaml", [RANKED, "train.world_size=4", "sweep.search=optuna"])
    plan = make_plan(params, cells(params, "ranked", as_given(params)), places())
    found = {size: (keys, asked) for size, keys, asked in by_world_size(plan, list(plan.trials))}
    assert sorted(found) == [1, 2]
    for size, (keys, asked) in found.items():
        assert [plan.trials[key].world_size for key in keys] == [size]
        assert [cell.vary["world_size"] for cell in asked] == [size]
        assert {cell.trial({"rank": 1}).world_size for cell in asked} == {size}
    alone = [(size, len(asked)) for size, _, asked in by_world_size(plan, [])]  # what is listed is trained already
    assert alone == [(1, 1), (2, 1)]


def test_optuna_is_not_asked_for_the_ranks_of_a_slot():
    own = RANKED.replace("vary: {world_size: [1, 2]}, ", "").replace("rank: [1, 2]", "world_size: [1, 2]")
    params = load(ROOT / "params.yaml", [own, "sweep.search=optuna"])
    with pytest.raises(InputError, match=r"ranked.methods.hificl.search.world_size.*under the study's `vary`"):
        make_plan(params, cells(params, "ranked", as_given(params)), places())
    params = load(ROOT / "params.yaml", [own])
    plan = make_plan(params, cells(params, "ranked", as_given(params)), places())
    assert [size for size, _, _ in by_world_size(plan, list(plan.trials))] == [1, 2]


@pytest.mark.parametrize(("joins", "slots"), [(3, 2), (9, 0)])
def test_the_first_node_of_a_cluster_is_waited_for(monkeypatch, joins, slots):
    """After `ray up`, and when a head comes back, its workers are not there yet."""
    now, asked = [0.0], []

    def resources():
        asked.append(now[0])
        return {"CPU": 2.0} if len(asked) > joins else {"memory": 1.0}

    monkeypatch.setattr("ray.cluster_resources", resources)
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    monkeypatch.setattr("time.sleep", lambda _: now.__setitem__(0, now[0] + NODES_SECONDS / 6))
    if slots:
        assert count_slots(Sweep(address="auto"), 1, 9) == slots
    else:
        with pytest.raises(InputError, match="the cluster has 0 CPU"):
            count_slots(Sweep(address="auto"), 1, 9)
        assert len(asked) <= 8
    with pytest.raises(InputError, match="the cluster has 0 CPU"):  # a cluster of one's own is whole at once
        asked.clear()
        count_slots(Sweep(), 1, 9)
    assert len(asked) == 1


@pytest.mark.parametrize(("lost", "back", "looks"), [(True, True, 3), (True, False, 8), (False, False, 1)])
def test_a_lost_node_without_which_no_slot_fits_is_waited_for(monkeypatch, lost, back, looks):
    """The trials of one rank have ended on what was left, and those of two begin before it is back."""
    now, asked = [0.0], []

    def resources():
        asked.append(now[0])
        return {"CPU": 2.0 if back and len(asked) > 2 else 1.0}

    monkeypatch.setattr("ray.cluster_resources", resources)
    monkeypatch.setattr("ray.nodes", lambda: [{"Alive": True}, {"Alive": not lost}])
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    monkeypatch.setattr("time.sleep", lambda _: now.__setitem__(0, now[0] + NODES_SECONDS / 6))
    if back:
        assert count_slots(Sweep(address="auto"), 2, 9) == 1
    else:
        with pytest.raises(InputError, match="a slot needs 2 x 1 CPU"):
            count_slots(Sweep(address="auto"), 2, 9)
    assert len(asked) == looks
