"""Attention that keeps nothing, as decoding runs it, against the same attention with a gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pipeline import adapters
from pipeline.attention.virtual import virtual_attention

B, H, KV, S, D, N = 3, 4, 2, 9, 8, 5


def tensors(queries: int, packed: bool) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    learned = (B, H, N, D) if packed else (H, N, D)
    shapes = {"q": (B, H, queries, D), "k": (B, KV, S, D), "v": (B, KV, S, D), "keys": learned, "values": learned}
    return {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}


def masked() -> torch.Tensor:
    """A left-padded row, a row that sees nothing, a whole one."""
    mask = torch.ones(B, 1, 1, S, dtype=torch.bool)
    mask[0, ..., :3] = False
    mask[1] = False
    return mask


@pytest.mark.parametrize("queries", [1, S])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("replaces", [True, False, torch.tensor([True, False, True])])
@pytest.mark.parametrize("mask", [None, masked()])
@pytest.mark.parametrize("hidden", [False, True])
def test_it_is_the_same_attention(queries: int, packed: bool, replaces: Any, mask: Any, hidden: bool) -> None:
    given = tensors(queries, packed)
    bias = torch.randn(B, H, 1, N, dtype=torch.float64)
    if hidden:
        bias[..., 2:] = -torch.inf
        bias[1] = -torch.inf  # together with the mask: a row that sees no token at all
    call = {"bias": bias if hidden else None, "mask": mask, "replaces": replaces}
    with torch.no_grad():
        plain = virtual_attention(**given, **call)
    learned = virtual_attention(**{name: x.requires_grad_() for name, x in given.items()}, **call)
    assert plain.isfinite().all()
    torch.testing.assert_close(plain, learned.detach(), rtol=1e-12, atol=1e-12)


def test_tokens_are_computed_at_the_prefill_and_follow_the_parameters(tiny: Any, inputs: Any) -> None:
    model = tiny("mistral", dtype=torch.float64)
    batch = inputs(model)
    adapter = adapters.create("hificl", model)
    calls = []
    adapter.register_forward_hook(lambda *_: calls.append(1))
    settings = {"do_sample": False, "min_new_tokens": 4, "max_new_tokens": 4}
    with adapters.attach(model, adapter):
        first = model.generate(**batch, **settings)
        assert len(calls) == 1
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.add_(torch.randn_like(parameter))
        second = model.generate(**batch, **settings)
        assert len(calls) == 2
        uncached = model.generate(**batch, **settings, use_cache=False)
    assert not torch.equal(first, second)
    assert torch.equal(second, uncached)
