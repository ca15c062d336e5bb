"""Whole layers under torch.compile: what is attached is computed as without, or refused; never another layer's."""

from __future__ import annotations

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

from pipeline import adapters
from pipeline.adapters.attach import attach
from pipeline.backbones.decoder import decoder_of
from pipeline.backbones.states import recorded
from pipeline.core.errors import InputError

LEARNS = {"hificl": {"num_virtual_tokens": 4, "rank": 2}, "mimic": {}, "live": {}}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = MistralConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64, sliding_window=None,
    )  # fmt: skip
    return MistralForCausalLM(config).eval()


@pytest.fixture(params=["eager"])  # the graphs are run as they were traced: what is traced is the question here
def compiled_layers(model, request):
    torch._dynamo.reset()
    layers = decoder_of(model).layers
    for layer in layers:
        layer.forward = torch.compile(layer.forward, backend=request.param, dynamic=True)
    yield layers
    for layer in layers:
        vars(layer).pop("forward", None)
    torch._dynamo.reset()


def made(model, method: str, seed: int):
    adapter = adapters.create(method, model, **LEARNS[method])
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 1.5)
    return adapter


def computed(model, adapter, length: int) -> list[torch.Tensor]:
    states = torch.randn(2, length, 32, generator=torch.Generator().manual_seed(length))
    with attach(model, adapter):
        hidden = model.model(inputs_embeds=states, use_cache=False).last_hidden_state
        return [hidden.detach(), *torch.autograd.grad(hidden.square().sum(), list(adapter.parameters()))]


def eagerly(model, adapter, length: int) -> list[torch.Tensor]:
    layers = decoder_of(model).layers
    held = [vars(layer).pop("forward") for layer in layers]
    try:
        return computed(model, adapter, length)
    finally:
        for layer, forward in zip(layers, held, strict=True):
            layer.forward = forward


@pytest.mark.parametrize("compiled_layers", ["aot_eager"], indirect=True)
def test_two_adapters_compute_compiled_what_they_compute_eagerly(model, compiled_layers):
    both = [made(model, "hificl", 1), made(model, "hificl", 2), made(model, "mimic", 3)]
    wanted = [eagerly(model, adapter, 300) for adapter in both]
    assert (wanted[0][0] - wanted[1][0]).abs().max() > 0.05  # they differ, and so do their layers
    for adapter, values in zip([*both, *both], [*wanted, *wanted], strict=True):
        for ours, of_eager in zip(computed(model, adapter, 300), values, strict=True):
            torch.testing.assert_close(ours, of_eager, rtol=1e-4, atol=1e-4 * float(of_eager.abs().max()))


def test_hooks_that_compiled_layers_would_not_call_are_refused(model, compiled_layers):
    live, hificl = made(model, "live", 1), made(model, "hificl", 2)
    with pytest.raises(InputError, match="a compiled MistralDecoderLayer does not call hooks"):
        computed(model, live, 8)
    spec = decoder_of(model)
    with pytest.raises(InputError, match="does not call hooks"), recorded(spec, "mlp"):
        pass
    with recorded(spec, "residual") as states:  # the layers' own outputs: their hooks lie around what is compiled
        wanted = eagerly(model, hificl, 8)[0]
        assert torch.equal(computed(model, hificl, 8)[0], wanted)
    assert len(states) == 2 * len(spec.layers)
    model.forward = torch.compile(model.forward, backend="eager")
    try:
        with pytest.raises(InputError, match="a compiled MistralForCausalLM"):
            computed(model, hificl, 8)
    finally:
        del model.forward


def test_a_layer_compiled_while_it_is_edited_has_its_own_shift(model):
    layers, live = decoder_of(model).layers, made(model, "live", 1)
    wanted = computed(model, live, 8)[0]
    states = torch.randn(2, 8, 32, generator=torch.Generator().manual_seed(8))
    torch._dynamo.reset()
    with attach(model, live):
        for layer in layers:
            layer.forward = torch.compile(layer.forward, backend="eager", dynamic=True)
        try:
            hidden = model.model(inputs_embeds=states, use_cache=False).last_hidden_state
        finally:
            for layer in layers:
                del layer.forward
            torch._dynamo.reset()
    torch.testing.assert_close(hidden, wanted)
