"""Passes that a GPU replays: what a CPU can show of them, with a recorder that computes again into the same places."""

from __future__ import annotations

import warnings

import pytest
import torch

from pipeline import adapters, backbones
from pipeline.adapters.attach import attach
from pipeline.adapters.pack import Pack
from pipeline.backbones import passes
from pipeline.evaluate import generate
from pipeline.resident.visual_tokens import VisualTokens
from pipeline.train import loop, prefix_sharing
from pipeline.train.workbench import Workbench
from tests.evaluate.test_generate import requests_for

HIFICL, LIVE, LORA, PREFIX = (
    ("hificl", {}),
    ("live", {}),
    ("lora", {"scope": "decoder", "dropout": 0.0}),
    ("prefix", {}),
)


@pytest.fixture
def recorder(monkeypatch):
    """Let a CPU record: a replay computes again, from where the inputs stood to where the results stand."""
    replays: list[str] = []

    def record(work, pool):
        made = list(work())

        def replay() -> None:
            replays.append(work.__name__)
            with torch.enable_grad():
                values = work()
            for place, value in zip(made, values, strict=True):
                if place is not None:
                    place.data.copy_(value.data)

        return replay, made

    monkeypatch.setattr(passes, "record", record)
    for module in (passes, loop, generate):
        monkeypatch.setattr(module, "GRAPHS_ON", "cpu")
    return replays


def trained(trial, folder, methods, **fields):
    bench = Workbench(device="cpu")
    for number, (method, options) in enumerate(methods):
        given = {"epochs": 2, "selection_metric": "loss", "cuda_graphs": True, **options, **fields}
        bench.admit(trial(method, folder / f"{method}-{number}", **given))
    reports = []
    while bench.loop and bench.loop.trials:
        reports += bench.advance()
    return [(report.key, report.epoch, report.metrics.train_loss, report.metrics.selection_loss) for report in reports]


@pytest.mark.parametrize("methods", [[HIFICL], [LIVE], [LORA], [PREFIX], [HIFICL, ("hificl", {"rank": 2}), LIVE]])
def test_recorded_steps_give_the_losses_of_computed_ones(trial, tmp_path, monkeypatch, recorder, methods):
    monkeypatch.setattr(prefix_sharing, "LEAST_SAVED", 2.0)  # rows of their own, as an 8B backbone's prompts have them
    plain = trained(trial, tmp_path, methods, cuda_graphs=False)
    assert not recorder
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        recorded = trained(trial, tmp_path, methods)
    assert {"_forward", "_backward"} <= set(recorder)
    for (_, *numbers), (_, *wanted) in zip(recorded, plain, strict=True):
        assert numbers == pytest.approx(wanted, rel=2e-5)


@pytest.mark.parametrize("method", [("mimic", {}), ("lora", {"scope": "decoder", "dropout": 0.5}), ("prompt", {})])
def test_what_draws_or_is_looked_at_on_the_way_is_computed(trial, tmp_path, monkeypatch, recorder, method):
    monkeypatch.setattr(prefix_sharing, "LEAST_SAVED", 2.0)
    trained(trial, tmp_path, [method], epochs=1)
    assert not recorder


def test_a_recording_that_fails_or_lies_is_said_once_and_costs_no_number(trial, tmp_path, monkeypatch, recorder):
    monkeypatch.setattr(prefix_sharing, "LEAST_SAVED", 2.0)
    wanted = trained(trial, tmp_path, [HIFICL], cuda_graphs=False, learning_rate=0.05, epochs=1)

    def refused(work, pool):
        raise RuntimeError("operation not permitted when stream is capturing\nlong story")

    def frozen(work, pool):
        return (lambda: None), list(work())

    for record, said in ((refused, "operation not permitted when stream is capturing$"), (frozen, "off, of")):
        monkeypatch.setattr(passes, "record", record)
        with pytest.warns(UserWarning, match=f"training runs without CUDA graphs: RuntimeError: .*{said}"):
            numbers = trained(trial, tmp_path / record.__name__, [HIFICL], learning_rate=0.05, epochs=1)
        for (_, *values), (_, *right) in zip(numbers, wanted, strict=True):
            assert values == pytest.approx(right, rel=0.05 if record is frozen else 1e-3)


@pytest.mark.parametrize("name", backbones.names())
@pytest.mark.parametrize("stops", [(), (" ", "e")])
def test_recorded_tokens_are_those_of_generate(name, stops, tiny, pictures, recorder):
    loaded = tiny(name)
    options = {"max_new_tokens": 9, "visual_tokens": VisualTokens(loaded), "root": pictures, "stop_strings": stops}
    requests = requests_for(loaded, 7)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        recorded = generate.generate(loaded, requests, **options, batch_size=2)
    assert bool(recorder) == loaded.family.shares_prefix
    assert recorded == generate.generate(loaded, requests, **options)  # one batch: computed
    alone = generate.generate(loaded, requests[:1] * 3, **options, batch_size=2)
    assert alone == recorded[:1] * 3


def test_recorded_tokens_are_those_of_what_is_attached(tiny, pictures, recorder):
    loaded = tiny("idefics2-8b-base")
    members = [adapters.create("hificl", loaded.model, seed=seed) for seed in (0, 1)]
    members.append(adapters.create("live", loaded.model, seed=2))
    with torch.no_grad():
        for parameter in (x for member in members for x in member.parameters()):
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(parameter))))
    requests = requests_for(loaded, 3) * 3
    numbers = [number for number in range(3) for _ in range(3)]
    options = {"max_new_tokens": 6, "visual_tokens": VisualTokens(loaded), "root": pictures, "stop_strings": ()}
    pack = Pack(members)
    with attach(loaded.model, pack):
        computed = generate.generate(loaded, requests, **options, pack=pack, members=numbers)
        assert not recorder
        recorded = generate.generate(loaded, requests, **options, pack=pack, members=numbers, batch_size=4)
    assert recorder
    assert recorded == computed
    assert len(set(computed)) > 4


def test_tokens_that_cannot_be_recorded_are_computed(tiny, pictures, monkeypatch, recorder):
    loaded = tiny("idefics2-8b-base")
    options = {"max_new_tokens": 6, "visual_tokens": VisualTokens(loaded), "root": pictures, "stop_strings": ()}
    requests = requests_for(loaded, 6)
    wanted = generate.generate(loaded, requests, **options)

    def stale(work, pool):
        made = list(work())
        return (lambda: made[0].mul_(2.0)), made

    monkeypatch.setattr(passes, "record", stale)
    with pytest.warns(UserWarning, match="generation runs without CUDA graphs: RuntimeError: a recorded pass is"):
        assert generate.generate(loaded, requests, **options, batch_size=2) == wanted
