"""DeepSpeed is for Linux: what needs it says so before anything trains, and nothing else does."""

import importlib.util

import pytest

from pipeline.commands.doctor import examine
from pipeline.config.load import load
from pipeline.core.errors import InputError
from pipeline.plan.plan import Places, as_given, make_plan
from pipeline.plan.space import cells
from pipeline.sweep.train import check_engines
from tests.conftest import ROOT


@pytest.fixture
def without_deepspeed(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "deepspeed" else find(name, *rest)
    )


def trials(*settings):
    params = load(ROOT / "params.yaml", settings)
    return [cell.trial({}) for cell in cells(params, "hificl-table1", as_given(params))]


SHARDED = [
    ["train.zero_stage=2", "train.world_size=2"],
    ["train.offload=cpu", "train.zero_stage=2"],
    ["train.engine=deepspeed"],
]


@pytest.mark.parametrize("settings", SHARDED)
def test_zero_without_deepspeed_is_refused_with_the_way_out(without_deepspeed, settings):
    with pytest.raises(
        InputError, match=r"12 trials ask for ZeRO.*DeepSpeed.*not installed. Set train.zero_stage to 0"
    ) as said:
        check_engines(trials(*settings))
    assert "\n" not in str(said.value)
    assert check_engines(trials()) == "12 trained by torch"


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
@pytest.mark.parametrize("settings", SHARDED)
def test_with_deepspeed_it_is_trained_by_it(settings):
    assert check_engines(trials(*settings)) == "12 trained by deepspeed"


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_one_rank_without_offload_is_trained_by_torch_whatever_the_stage(stage):
    assert trials(f"train.zero_stage={stage}") == trials()
    both = trials(f"train.zero_stage={stage}", "train.engine=deepspeed")
    assert {(trial.engine, trial.zero_stage) for trial in both if trial.trained} == {("deepspeed", stage)}


@pytest.mark.parametrize("profile", ["real", "real-check"])
def test_the_papers_trials_start_on_one_card_without_zero(profile):
    params = load(ROOT / "params.yaml", profile=profile)
    made = [cell.trial({}) for cell in cells(params, "hificl-table1", as_given(params))]
    assert {(trial.engine, trial.zero_stage) for trial in made if trial.trained} == {("torch", 0)}


def test_ranks_that_would_share_a_card_are_refused_by_name():
    def plan(*settings):
        params = load(ROOT / "params.yaml", settings)
        return make_plan(params, cells(params, "hificl-table1", as_given(params)), Places(ROOT, ROOT, None))

    half = "sweep.gpus_per_worker=0.5"
    with pytest.raises(InputError, match=r"2 ranks of 0.5 GPU each would share a card.*sweep.gpus_per_worker to 1"):
        plan(half, "train.world_size=2")
    assert len(plan(half).trials) == len(plan("sweep.gpus_per_worker=1", "train.world_size=2").trials)
    with pytest.raises(InputError, match=r"more than one GPU is a whole number"):
        load(ROOT / "params.yaml", ["sweep.gpus_per_worker=1.5"])


def test_the_doctor_says_it(without_deepspeed, monkeypatch):
    monkeypatch.chdir(ROOT)
    found = {
        name: examine(load(overrides=chosen), ROOT).record()["checks"]
        for name, chosen in (("mini", []), ("zero", SHARDED[0]))
    }
    states = {name: {check["name"]: check for check in checks}["studies"] for name, checks in found.items()}
    assert states["mini"]["state"] == "ok" and "trained by torch" in states["mini"]["detail"]
    assert states["zero"]["state"] == "missing" and "train.zero_stage to 0" in states["zero"]["way_out"]
    assert {check["name"]: check["state"] for check in found["mini"]}["packages"] == "ok"
