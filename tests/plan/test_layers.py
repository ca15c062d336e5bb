"""Layers of settings: the last one that writes a setting wins, and a method's options are checked once a trial."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.adapters.options import Options
from pipeline.config.load import Train, load
from pipeline.core.errors import InputError
from pipeline.plan.plan import as_given, make_plan, places
from pipeline.plan.settings import Settings
from pipeline.plan.space import cells
from tests.conftest import ROOT

VALUES = {
    "epochs": st.integers(1, 9), "epochs_below_1000": st.integers(1, 9), "weight_decay": st.sampled_from([0.0, 0.5]),
    "rank": st.integers(1, 9), "num_virtual_tokens": st.integers(1, 9),
}  # fmt: skip
LAYERS = st.lists(st.fixed_dictionaries({}, optional=VALUES), max_size=6)


@given(LAYERS)
def test_who_writes_last_wins_and_epochs_alone_are_for_any_number_of_samples(layers):
    settings = Settings("hificl")
    wanted = {**Train().model_dump(), **settings.options.plain()}
    for layer in layers:
        settings = settings.over(layer, "here")
        both = {"epochs_below_1000": layer["epochs"]} if "epochs" in layer else {}
        wanted |= {**both, **layer}
    assert {name: settings.value(name) for name in VALUES} == {name: wanted[name] for name in VALUES}


def test_a_combined_methods_part_keeps_what_a_later_layer_does_not_write():
    settings = Settings("mimic+lora").over({"lora": {"rank": 4}}, "here").over({"lora": {"dropout": 0.0}}, "there")
    assert (settings.options.plain()["lora"]["rank"], settings.options.plain()["lora"]["dropout"]) == (4, 0.0)


@pytest.mark.parametrize(
    ("layer", "says"),
    [
        ({"rnak": 4}, "the study: unknown field 'rnak'. Did you mean 'rank'"),
        ({"epochs": 0}, "the study: epochs: Input should be greater than or equal to 1, got 0"),
    ],
)
def test_what_a_layer_cannot_set_is_refused_with_the_layers_name(layer, says):
    with pytest.raises(InputError) as refused:
        Settings("hificl").over(layer, "the study")
    assert str(refused.value).startswith(says)


def test_options_are_checked_once_for_each_trial_and_each_method(monkeypatch):
    monkeypatch.chdir(ROOT)
    params, checked = load(), Options.checked.__func__
    asked: list[str] = []

    def counted(cls, given, method):
        asked.append(method)
        return checked(cls, given, method)

    monkeypatch.setattr(Options, "checked", classmethod(counted))
    planned = cells(params, "hificl-table1", as_given(params))
    plan = make_plan(params, planned, places())
    in_planning = len(asked)
    for config in plan.trials.values():
        plan.request_of(config)
    methods = {cell.method for cell in planned}
    assert in_planning <= len(planned) * 2 and len(asked) - in_planning <= len(methods)
