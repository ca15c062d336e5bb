"""Shared rows give what plain rows give: states, losses, gradients; and they are taken only where they save enough."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import adapters, backbones
from pipeline.adapters.attach import attach
from pipeline.backbones.decoder import decoder_of
from pipeline.prompts.prompt import shared_prefix_length
from pipeline.train import loop
from pipeline.train.prefix_sharing import PrefixLayout, row_pays, sharing_prefix
from pipeline.train.workbench import Workbench
from tests.support.tiny_hub import make
from tests.train.test_loop import FEW, LORAS, MIXED, gap, train

IMAGE = 9


def test_the_common_head_ends_before_the_first_image_and_where_prompts_part():
    assert shared_prefix_length([[1, 2, 3, 4], [1, 2, 5], [1, 2, 3, 7]], IMAGE) == 2
    assert shared_prefix_length([[1, 2, IMAGE, 4], [1, 2, IMAGE, 5]], IMAGE) == 2
    assert shared_prefix_length([[1, 2], [1, 2, 3]], IMAGE) == 2
    assert shared_prefix_length([[3, 1], [2, 1]], IMAGE) == 0
    assert shared_prefix_length([[1, 2, 3]], IMAGE) == 0  # nobody to share with


@settings(deadline=None)
@given(
    trials=st.lists(
        st.tuples(st.integers(0, 6), st.lists(st.integers(1, 5), min_size=1, max_size=4)), min_size=1, max_size=3
    )
)
def test_every_token_sees_its_own_sample_up_to_itself(trials):
    heads = [head for head, _ in trials]
    lengths = [[head + rest for rest in rests] for head, rests in trials]
    flat = [length for mine in lengths for length in mine]
    width = max(flat)
    layout = PrefixLayout.of(lengths, heads, width, like=torch.zeros(1))
    assert layout.sizes == tuple(head + sum(rests) for head, rests in trials)
    rows, longest = layout.taken.shape
    assert longest == max(head + sum(rests) for head, rests in trials)
    # what a token stands for: its sample's number and place; all samples of a trial have one and the same head
    trial_of = [n for n, mine in enumerate(lengths) for _ in mine]
    first_of = [trial_of.index(n) for n in trial_of]
    for sample, length in enumerate(flat):
        row = trial_of[sample]
        for at in range(length):
            place = int(layout.places[sample, at])
            assert place // longest == row and int(layout.positions.flatten()[place]) == at
            owner = first_of[sample] if at < heads[row] else sample
            assert int(layout.taken.flatten()[place]) == owner * width + at
            seen = (layout.mask[row, 0, place % longest] == 0).nonzero()[:, 0].tolist()
            assert seen == sorted(int(p) % longest for p in layout.places[sample, : at + 1])
    assert rows == len(trials)


def test_rows_stay_plain_where_sharing_saves_little_or_grows_long():
    assert row_pays([30] * 8, 16)
    assert not row_pays([30] * 8, 2)  # 226 of 240 tokens
    assert row_pays([12, 12], 10)
    assert row_pays([100] * 4, 60)
    assert not row_pays([200] * 4, 100)  # 500 tokens in one row


FOLDING = [name for name in backbones.names() if backbones.get(name).family.shares_prefix]


@pytest.mark.parametrize("name", FOLDING)
def test_a_decoder_gives_the_states_of_plain_rows(name):
    variant = "published" if name.startswith("mini") else "tiny"
    model = backbones.load(name, variant=variant).model.double()
    spec = decoder_of(model)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(10, 100, (3, 12), generator=generator)
    ids[:, :5] = ids[0, :5]
    lengths = [12, 9, 11]
    with torch.no_grad():
        plain = model.model(input_ids=ids, use_cache=False).last_hidden_state
        layout = PrefixLayout.of([lengths], [5], 12, like=plain)
        with sharing_prefix(spec, layout):
            found = model.model(input_ids=ids, use_cache=False).last_hidden_state
        assert torch.equal(model.model(input_ids=ids, use_cache=False).last_hidden_state, plain)  # the block is left
    for row, length in enumerate(lengths):
        torch.testing.assert_close(found[row, :length], plain[row, :length], rtol=0, atol=1e-6)  # norms are fp32


def test_a_text_decoder_that_embeds_tokens_itself_gives_the_states_of_plain_rows(tmp_path):
    model = backbones.load(f"folder:{make('llama', tmp_path / 'text')}").model.double()
    ids = torch.arange(10, 34).view(2, 12)
    ids[1, :6] = ids[0, :6]
    with torch.no_grad():
        plain = model(input_ids=ids, use_cache=False).logits
        with sharing_prefix(decoder_of(model), PrefixLayout.of([[12, 12]], [6], 12, like=plain)):
            shared = model(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(shared, plain, rtol=0, atol=1e-6)


@pytest.mark.parametrize("step", [{}, {"micro_batch_size": 5, "accumulation": 1}], ids=["2x2", "5"])
def test_trials_lose_what_they_lose_in_plain_rows(trial, tmp_path, monkeypatch, step):
    bench = Workbench(device="cpu")
    bench.resident(trial("hificl", tmp_path)).loaded.model.double()
    chosen = [(method, {**FEW, **step, **options}) for method, options in MIXED if "micro_batch_size" not in options]

    def run(name):
        requests = [trial(method, tmp_path / name, **options) for method, options in chosen]
        return train(bench, requests, double=True)

    made = []
    layout_of = PrefixLayout.of
    monkeypatch.setattr(PrefixLayout, "of", lambda *x, **y: made.append(layout_of(*x, **y)) or made[-1])
    together = run("shared")
    assert len(made) > 5
    monkeypatch.setattr(loop, "row_pays", lambda *_: False)
    assert gap(together, run("plain")) < 1e-7  # norms and angles are fp32


def test_dropout_keeps_rows_apart(trial, tmp_path, monkeypatch):
    bench = Workbench(device="cpu")
    made = []
    monkeypatch.setattr(PrefixLayout, "of", lambda *x, **y: made.append(1))
    method, options = LORAS[0]
    train(bench, [trial(method, tmp_path / "wet", epochs=1, **options)])
    assert not made
    train(bench, [trial(method, tmp_path / "dry", epochs=1, dropout=0.0, **options)])
    assert made


def test_attached_adapters_get_the_gradients_of_plain_rows(trial, tmp_path):
    bench = Workbench(device="cpu")
    model = bench.resident(trial("hificl", tmp_path)).loaded.model.double()
    spec = decoder_of(model)
    ids = torch.arange(10, 34).view(2, 12)
    ids[1, :6] = ids[0, :6]
    for method in ("hificl", "mimic", "live"):
        adapter = adapters.create(method, model, seed=3).double()
        for parameter in adapter.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        found = []
        for layout in (None, PrefixLayout.of([[12, 12]], [6], 12, like=torch.zeros(1, dtype=torch.float64))):
            adapter.zero_grad()
            with attach(model, adapter), sharing_prefix(spec, layout):
                model.model(input_ids=ids, use_cache=False).last_hidden_state.square().sum().backward()
            found.append([parameter.grad.clone() for parameter in adapter.parameters()])
        for plain, mine in zip(*found, strict=True):
            assert (mine - plain).norm() < 1e-6 * plain.norm()  # norms and angles are fp32
