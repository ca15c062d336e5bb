"""Tokens that a GPU replays: what a CPU can show of them, with a recorder that computes again into the same places."""

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
from tests.evaluate.test_generate import requests_for


@pytest.fixture
def replays(monkeypatch):
    """Let a CPU record: a replay computes again, from where the inputs stood to where the result stands."""
    counted: list[int] = []

    def record(work):
        place = work().clone()

        def replay() -> None:
            counted.append(1)
            place.copy_(work())

        return replay, place

    monkeypatch.setattr(passes, "record", record)
    monkeypatch.setattr(generate, "GRAPHS_ON", "cpu")
    return counted


@pytest.mark.parametrize("name", backbones.names())
@pytest.mark.parametrize("stops", [(), (" ", "e")])
def test_recorded_tokens_are_those_of_generate(name, stops, tiny, pictures, replays):
    loaded = tiny(name)
    options = {"max_new_tokens": 9, "visual_tokens": VisualTokens(loaded), "root": pictures, "stop_strings": stops}
    requests = requests_for(loaded, 7)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        recorded = generate.generate(loaded, requests, **options, batch_size=2)
    assert bool(replays) == loaded.family.shares_prefix
    assert recorded == generate.generate(loaded, requests, **options)  # one batch: computed
    alone = generate.generate(loaded, requests[:1] * 3, **options, batch_size=2)
    assert alone == recorded[:1] * 3


def test_recorded_tokens_are_those_of_what_is_attached(tiny, pictures, replays):
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
        assert not replays
        recorded = generate.generate(loaded, requests, **options, pack=pack, members=numbers, batch_size=4)
    assert replays
    assert recorded == computed
    assert len(set(computed)) > 4


def test_what_is_computed_before_the_recording_leaves_no_trace(tiny, pictures, monkeypatch, replays):
    """On a GPU the pass runs before it is recorded, as often as its kernels ask for."""
    loaded = tiny("idefics2-8b-base")
    options = {"max_new_tokens": 6, "visual_tokens": VisualTokens(loaded), "root": pictures, "stop_strings": ()}
    requests = requests_for(loaded, 6)
    wanted = generate.generate(loaded, requests, **options)
    monkeypatch.setattr(passes, "warmed", lambda work: [work() for _ in range(3)][-1])
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert generate.generate(loaded, requests, **options, batch_size=2) == wanted
    assert replays


def test_tokens_that_cannot_be_recorded_are_computed(tiny, pictures, monkeypatch, replays):
    loaded = tiny("idefics2-8b-base")
    options = {"max_new_tokens": 6, "visual_tokens": VisualTokens(loaded), "root": pictures, "stop_strings": ()}
    requests = requests_for(loaded, 6)
    wanted = generate.generate(loaded, requests, **options)

    def refused(work):
        raise RuntimeError("operation not permitted when stream is capturing\nlong story")

    def stale(work):
        place = work().clone()
        return (lambda: place.mul_(2.0)), place

    for record, said in ((refused, "operation not permitted when stream is capturing$"), (stale, "a recorded pass is")):
        monkeypatch.setattr(passes, "record", record)
        with pytest.warns(UserWarning, match=f"tokens are decoded without CUDA graphs: RuntimeError: {said}"):
            assert generate.generate(loaded, requests, **options, batch_size=2) == wanted
