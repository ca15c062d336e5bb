"""What virtual tokens weigh, seen while a model runs, and a model without some of them."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from pipeline import adapters
from pipeline.adapters import edits
from pipeline.attention.virtual import virtual_attention
from tests.adapters.conftest import logits, stirred


@pytest.mark.parametrize(("n", "size"), [(3, 8), (11, 4)], ids=["fits a head", "wider than a head"])
def test_weights_are_the_softmax_over_virtual_tokens_and_context(n: int, size: int) -> None:
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    q, k, keys, bias = drawn(2, 4, 5, size), drawn(2, 2, 5, size), drawn(4, n, size), drawn(4, 1, n)
    attended = partial(virtual_attention, q, k, keys=keys, bias=bias, scale=0.3)
    seen = edits._virtual_weights(attended, keys, torch.ones_like(k))
    scores = 0.3 * q @ k.repeat_interleave(2, 1).transpose(-1, -2)
    scores = scores.masked_fill(~torch.ones(5, 5, dtype=torch.bool).tril(), float("-inf"))
    virtual = 0.3 * q @ keys.transpose(-1, -2) + bias
    torch.testing.assert_close(seen, torch.cat([virtual, scores], -1).softmax(-1)[..., :n], rtol=0, atol=1e-14)


@pytest.mark.parametrize(("method", "options"), [("hificl", {}), ("mimic", {}), ("prefix", {}), ("moe-hificl", {})])
def test_every_layer_is_shown_once_a_pass_and_shares_are_below_one(
    method: str, options: dict[str, Any], tiny: Any, inputs: Any
) -> None:
    model, seen = tiny("idefics2"), {}
    adapter = stirred(adapters.create(method, model, **options))
    batch = inputs(model)
    rows, tokens = batch["input_ids"].shape
    with adapters.attach(model, adapter) as pack:
        plain = logits(model, batch)
        pack.watch = seen.__setitem__
        assert torch.equal(logits(model, batch), plain)
    assert list(seen) == [0, 1, 2]
    for weights in seen.values():
        assert weights.shape[:3] == (rows, 4, tokens)
        assert weights.min() >= 0 and 0 < weights.sum(-1).max() < 1


def test_a_model_without_some_virtual_tokens_is_that_of_an_adapter_that_never_had_them(tiny: Any, inputs: Any) -> None:
    model = tiny("idefics2", dtype=torch.float64)
    whole = stirred(adapters.create("hificl", model, num_virtual_tokens=3, lowrank_k=False, lowrank_v=False)).double()
    fewer = adapters.create("hificl", model, num_virtual_tokens=2, lowrank_k=False, lowrank_v=False).double()
    with torch.no_grad():
        fewer.k.copy_(whole.k[..., :2, :])
        fewer.v.copy_(whole.v[..., :2, :])
    batch = inputs(model)
    base = logits(model, batch)
    with adapters.attach(model, fewer):
        wanted = logits(model, batch)
    with adapters.attach(model, whole) as pack:
        everything = logits(model, batch)
        pack.without = torch.tensor([[False, False, True]]).expand(3, 3)
        torch.testing.assert_close(logits(model, batch), wanted, rtol=0, atol=1e-12)
        pack.without = torch.ones(3, 3, dtype=torch.bool)
        torch.testing.assert_close(logits(model, batch), base, rtol=0, atol=1e-12)
        pack.without = None
        assert torch.equal(logits(model, batch), everything) and not torch.allclose(everything, wanted)
