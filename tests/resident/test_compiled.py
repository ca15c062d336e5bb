"""`train.compile`: the frozen parts run compiled, the numbers stay what they are, and nothing is left behind."""

from __future__ import annotations

import shutil

import pytest
import torch

from pipeline.adapters.options import Facts
from pipeline.backbones.decoder import decoder_of
from pipeline.config.load import load
from pipeline.core.errors import InputError
from pipeline.methods import parse
from pipeline.plan.plan import pack_key
from pipeline.plan.space import _engine
from pipeline.train.loop import TrainingLoop
from pipeline.train.workbench import Workbench
from tests.conftest import ROOT

pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler: g++ is not installed"),
]


def losses(bench: Workbench, request) -> list[float]:
    bench.admit(request)
    found = []
    while bench.loop is not None and bench.loop.trials:
        found += [report.metrics.train_loss for report in bench.advance()]
    return found


@pytest.mark.parametrize(("method", "runs_compiled"), [("hificl", True), ("lora", False)])
def test_a_compiled_trial_loses_what_an_eager_one_loses(trial, tmp_path, method, runs_compiled):
    bench = Workbench(device="cpu")
    eager = losses(bench, trial(method, tmp_path / "eager", rank=2, epochs=1))
    resident = bench.loop.resident
    assert not resident.forwards
    compiled = losses(bench, trial(method, tmp_path / "compiled", rank=2, epochs=1, compile=True))
    assert compiled == pytest.approx(eager, abs=1e-5)
    layers = decoder_of(resident.loaded.model).layers
    assert len(resident.forwards) == (3 * len(layers) if runs_compiled else 0)  # two norms and a feed-forward net
    assert all("forward" not in vars(part) for layer in layers for part in layer.children())


def test_its_key_is_another_and_that_of_a_trial_without_is_what_it_was(trial, tmp_path):
    plain = trial("hificl", tmp_path).config
    assert plain.model_copy(update={"compile": True}).key != plain.key
    assert "compile" not in plain.model_dump(exclude=plain.later)


def test_a_deterministic_trial_runs_under_fixed_sums_and_loses_the_same(trial, tmp_path, monkeypatch):
    bench, seen = Workbench(device="cpu"), []
    advance = TrainingLoop.advance
    enabled = torch.are_deterministic_algorithms_enabled
    monkeypatch.setattr(TrainingLoop, "advance", lambda self: seen.append(enabled()) or advance(self))
    plain, fixed = (trial("hificl", tmp_path / str(on), rank=2, epochs=1, deterministic=on) for on in (False, True))
    assert losses(bench, plain) == losses(bench, fixed)
    assert seen == [False, True] and not enabled()
    assert plain.config.key != fixed.config.key and "deterministic" not in plain.config.model_dump(
        exclude=plain.config.later
    )
    assert pack_key(plain.config) != pack_key(fixed.config)


def test_zero_3_is_refused():
    sharded = ["train.engine=deepspeed", "train.zero_stage=3"]
    train = load(ROOT / "params.yaml", ["train.compile=true", *sharded]).train
    with pytest.raises(InputError, match="ZeRO-3 gathers"):
        _engine(train, Facts(), "here")
    train = load(ROOT / "params.yaml", sharded).train
    assert _engine(train, parse("lora", {}).facts(), "here")["zero_stage"] == 3
    with pytest.raises(InputError, match="PEFT reads the backbone's weights.*Set train.zero_stage to 2"):
        _engine(train, parse("peft", {}).facts(), "here")
