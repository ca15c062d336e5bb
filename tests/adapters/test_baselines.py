"""The trained baselines against the plainest computation of their equations, in float64."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from pipeline import adapters
from pipeline.adapters.edits import AttentionEdit
from pipeline.adapters.pack import Pack
from pipeline.backbones.decoder import decoder_of
from pipeline.core.errors import InputError
from tests.adapters.conftest import logits, stirred
from tests.adapters.test_states import precise_norms


def agree(model: Any, adapter: Any, batch: dict[str, Any], expected: Tensor) -> None:
    """Compare logits and gradients of the attached model with an oracle's."""
    wanted = torch.autograd.grad(expected.square().mean(), list(adapter.parameters()))
    with adapters.attach(model, adapter):
        found = model(**batch).logits
        got = torch.autograd.grad(found.square().mean(), list(adapter.parameters()))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    for a, b in zip(got, wanted, strict=True):
        assert b.abs().sum() > 0
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("key_heads", [1, 2, 4])
def test_a_prefix_is_a_cache_of_free_keys_and_values(key_heads: int, tiny: Any, inputs: Any) -> None:
    model = tiny("mistral", dtype=torch.float64, num_key_value_heads=key_heads)
    ids = inputs(model)["input_ids"]
    adapter = stirred(adapters.create("prefix", model, num_virtual_tokens=3)).double()
    cache = DynamicCache()
    for layer, (keys, values) in enumerate(zip(adapter.keys, adapter.values, strict=True)):
        cache.update(keys.expand(2, -1, -1, -1), values.expand(2, -1, -1, -1), layer)
    with precise_norms():
        seen = {"attention_mask": torch.ones(2, 15, dtype=torch.long), "position_ids": torch.arange(12).expand(2, -1)}
        expected = model(input_ids=ids, past_key_values=cache, **seen).logits
        agree(model, adapter, {"input_ids": ids}, expected)


@pytest.mark.parametrize("key_heads", [1, 2, 4])
def test_a_soft_prompt_is_embeddings_in_front(key_heads: int, tiny: Any, inputs: Any) -> None:
    model = tiny("mistral", dtype=torch.float64, num_key_value_heads=key_heads)
    ids, table = inputs(model)["input_ids"], model.get_input_embeddings()
    adapter = adapters.create("prompt", model, num_virtual_tokens=3)
    assert all((row == table.weight).all(-1).any() for row in adapter.prompt.double())  # it starts as tokens
    stirred(adapter).double()
    rows = torch.cat([adapter.prompt.expand(2, -1, -1), table(ids)], 1)
    with precise_norms():
        expected = model(inputs_embeds=rows, position_ids=torch.arange(-3, 12).expand(2, -1)).logits[:, 3:]
        agree(model, adapter, {"input_ids": ids}, expected)


@pytest.mark.parametrize("family", ["mistral", "qwen2", "llama", "qwen3_vl"])
def test_its_positions_are_as_good_as_those_from_0(family: str, tiny: Any, inputs: Any) -> None:
    model = tiny(family, dtype=torch.float64)
    ids = inputs(model)["input_ids"]
    adapter = stirred(adapters.create("prompt", model, num_virtual_tokens=3)).double()
    rows = torch.cat([adapter.prompt.expand(2, -1, -1), model.get_input_embeddings()(ids)], 1)
    usual = model(inputs_embeds=rows).logits[:, 3:].detach()
    with adapters.attach(model, adapter):  # norms and RoPE's angles are fp32
        torch.testing.assert_close(logits(model, {"input_ids": ids}), usual, rtol=0, atol=1e-4)


def test_nobody_who_listens_sees_the_soft_prompts_own_pass(tiny: Any, inputs: Any) -> None:
    from pipeline.backbones.decoder import checkpointed_layers
    from pipeline.backbones.states import recorded

    model = tiny("llava")
    spec, batch = decoder_of(model), inputs(model)
    adapter, gradients = stirred(adapters.create("prompt", model)), []
    for again in (False, True):
        with adapters.attach(model, adapter), recorded(spec, "residual") as seen, recorded(spec, "mlp") as m:
            with checkpointed_layers(model) if again else nothing():
                out = model(**batch, use_cache=False).logits
                assert {tuple(x.shape) for x in (*seen, *m)} == {(2, 12, 32)} and len(seen) == len(m) == 3
                gradients.append(torch.autograd.grad(out.square().mean(), adapter.prompt)[0])
    torch.testing.assert_close(*gradients)


@contextmanager
def nothing() -> Iterator[None]:
    yield


@pytest.mark.parametrize(
    ("method", "options"),
    [("bottleneck", {"width": 3}), ("bottleneck", {"places": ["mlp"]}), ("m2iv", {}), ("i2cl", {})],
)
def test_what_attention_and_ffn_give_is_edited_before_it_is_added(
    method: str, options: dict[str, Any], tiny: Any, inputs: Any
) -> None:
    model = tiny("mistral", dtype=torch.float64)
    ids = inputs(model)["input_ids"]
    adapter = stirred(adapters.create(method, model, **options)).double()

    def edited(part: Any, layer: int, x: Tensor) -> Tensor:
        if method == "m2iv":
            return x + part.scale[layer] * part.vector[layer]
        if method == "i2cl":
            return part.share[layer] * x + part.strength[layer] * part.context[layer]
        down = torch.nn.functional.linear(x, part.down[layer].T, part.down_bias[layer])
        return x + torch.nn.functional.linear(torch.nn.functional.gelu(down), part.up[layer].T, part.up_bias[layer])

    hooks = []
    for number, layer in enumerate(model.model.layers):
        for place, part in adapter.part.items():
            module = layer.mlp if place == "mlp" else layer.self_attn
            hooks.append(
                module.register_forward_hook(
                    lambda _, args, out, number=number, part=part: (
                        (edited(part, number, out[0]), *out[1:])
                        if isinstance(out, tuple)
                        else edited(part, number, out)
                    )
                )
            )
    with precise_norms():
        expected = model(input_ids=ids).logits
        for hook in hooks:
            hook.remove()
        agree(model, adapter, {"input_ids": ids}, expected)
    assert len(hooks) == 3 * len(adapter.parts)


def test_a_soft_prompt_without_a_decoder_is_refused(tiny: Any) -> None:
    with pytest.raises(InputError, match="nothing without a decoder"):
        adapters.create("prompt", tiny("llava"))()


@pytest.mark.parametrize("heads", ["query", "kv"])
def test_sets_of_virtual_tokens_are_mixed_by_a_router_on_the_query(heads: str, tiny: Any) -> None:
    model = tiny("mistral", dtype=torch.float64)
    spec = decoder_of(model)
    options = {"experts": 3, "num_virtual_tokens": 2, "rank": 2, "heads": heads}
    adapter = stirred(adapters.create("moe-hificl", model, **options)).double()
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(2, h, 5, spec.head_dim, generator=generator, dtype=torch.float64).requires_grad_()
        for h in (spec.num_heads, spec.num_kv_heads, spec.num_kv_heads)
    )
    keys, values = adapter.k_a @ adapter.k_b, adapter.v_a @ adapter.v_b
    rows = []
    for head in range(spec.num_heads):
        own, group = head if heads == "query" else head // 2, head // 2
        for row in range(2):
            for t in range(5):
                x = q[row, head, t]
                seen = (k[row, group, : t + 1] @ x / spec.head_dim**0.5).exp()
                total, out = seen.sum(), seen @ v[row, group, : t + 1]
                gates = (adapter.router[1, own] @ x).softmax(0)
                for expert in range(3):
                    mass = gates[expert] * (keys[1, own, expert] @ x / spec.head_dim**0.5).exp()
                    total, out = total + mass.sum(), out + mass @ values[1, own, expert]
                rows.append(out / total)
    expected = torch.stack(rows).view(spec.num_heads, 2, 5, spec.head_dim).transpose(0, 1)
    edit = AttentionEdit({0: adapter}, Pack(adapter), spec, lambda states: (states, states))
    learnt = [q, k, v, *adapter.parameters()]
    found = edit.attend(1, q, k, v, None, scale=None, causal=True)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    pairs = (torch.autograd.grad(x.square().sum(), learnt) for x in (found, expected))
    for a, b in zip(*pairs, strict=True):
        assert b.abs().sum() > 0
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_one_expert_is_hificl(tiny: Any, inputs: Any) -> None:
    model = tiny("mistral", dtype=torch.float64)
    batch = inputs(model)
    for options in ({}, {"alpha": "one"}, {"alpha_init": "identity"}):
        one = stirred(adapters.create("moe-hificl", model, experts=1, **options)).double()
        plain = adapters.create("hificl", model, **options).double()
        plain.load_state_dict({name: x[:, :, 0] for name, x in one.state_dict().items() if name != "router"})
        found = []
        for adapter in (one, plain):
            with adapters.attach(model, adapter):
                found.append(logits(model, batch))
        torch.testing.assert_close(*found, rtol=0, atol=1e-6)  # norms are fp32


@pytest.mark.parametrize("family", ["llava", "idefics2"])
def test_a_connector_is_trained_whole_and_nothing_else(family: str, tiny: Any, inputs: Any) -> None:
    model = tiny(family, dtype=torch.float64)
    batch = inputs(model)
    adapter = adapters.create("connector", model).double()
    plain = logits(model, batch)
    with adapters.attach(model, adapter):
        assert torch.equal(logits(model, batch), plain)
    stirred(adapter)
    moved = {f"{key.replace('/', '.')}.weight": x for key, x in adapter.weight.items()}
    moved |= {f"{key.replace('/', '.')}.bias": x for key, x in adapter.bias.items()}
    place = ("model.multi_modal_projector.", "model.connector.")
    assert moved.keys() == {
        name
        for name, x in model.named_parameters()
        if name.startswith(place) and (x.dim() == 2 and "latents" not in name or name.endswith("bias"))
    }
    values = dict(model.named_parameters())
    expected = torch.func.functional_call(
        model, {name: values[name] + x for name, x in moved.items()}, (), batch
    ).logits
    agree(model, adapter, batch, expected)


def test_a_text_model_has_no_connector(tiny: Any) -> None:
    with pytest.raises(InputError, match="no linear module in .*Name its connector in `modules`"):
        adapters.create("connector", tiny("mistral"))
