"""What a number may differ by when it is made again: nothing, where nothing can sum in another order."""

import pytest

from pipeline.lineage import reproduce
from pipeline.lineage.reproduce import _environment, _tolerance
from pipeline.lineage.run_record import RunRecord
from pipeline.records.evaluation import Evaluation
from pipeline.records.trial import Provenance
from pipeline.tracking.provenance import this_machine
from pipeline.tracking.records import text_of
from tests.conftest import ROOT


def scored(unit):
    fields = {"trial": "t", "config": {}, "evaluation": {}, "metric": "m", "value": 1.0, "metrics": {}}
    return Evaluation(**fields, unit=unit, num_samples=0, predictions=())


def made(unit="percent", packed="1", world_size=1, exact=None, **on):
    record = Provenance(machine=this_machine().model_copy(update={"gpus": (), **on}))
    tags = {"packed": packed} | ({} if exact is None else {"exact": text_of(exact)})
    return RunRecord("id", {"world_size": world_size}, scored(unit), {}, record, tags)


def test_alone_on_this_processor_it_is_nothing():
    assert _tolerance(made()) == 0.0
    assert _tolerance(made(packed="4", exact=True)) == 0.0  # with others, each by the sums that it has alone
    assert _tolerance(RunRecord("id", {}, None, {}, Provenance(), {})) == 0.0  # a machine was not recorded


@pytest.mark.parametrize(
    "record",
    [
        made(packed="2"),
        made(packed="1", exact=False),
        made(world_size=2),
        made(gpus=("H100",)),
        made(cpu="another processor"),
    ],
)
def test_where_sums_come_in_another_order_it_is_not(record):
    assert _tolerance(record) == 1.0
    assert _tolerance(RunRecord(**{**vars(record), "evaluation": scored("fraction")})) == 0.02


def test_with_fixed_sums_on_the_same_card_it_is_nothing(monkeypatch):
    here = this_machine().model_copy(update={"gpus": ("H100",)})
    monkeypatch.setattr(reproduce, "this_machine", lambda: here)
    record = made(gpus=("H100",))
    fixed = RunRecord(**{**vars(record), "config": {"world_size": 1, "deterministic": True}})
    assert _tolerance(fixed) == 0.0
    assert _tolerance(record) == 1.0
    monkeypatch.setattr(reproduce, "this_machine", lambda: here.model_copy(update={"gpus": ("A100",)}))
    assert _tolerance(fixed) == 1.0


def test_another_processor_is_named():
    notes = _environment(made(cpu="another processor"), ROOT, here=False).notes
    assert any("another processor than the run's, another processor" in note for note in notes)
    assert not any("processor" in note for note in _environment(made(), ROOT, here=False).notes)
