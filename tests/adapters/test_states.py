"""The states of a decoder layer, by name and by an oracle that runs the layers by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn

from pipeline import adapters
from pipeline.backbones.decoder import decoder_of
from pipeline.backbones.states import modules_at, recorded
from pipeline.core.errors import InputError
from tests.adapters.conftest import FAMILIES, TEXT, logits, stirred

STATES = ("attention", "residual-mid", "mlp", "residual")
POINTS = ("mlp", "residual")


def _text(kind: str, config: str, **over: Any) -> Callable[[], nn.Module]:
    return lambda: getattr(tf, kind)(getattr(tf, config)(**{**TEXT, "num_key_value_heads": 2, **over}))


mixtral = _text("MixtralForCausalLM", "MixtralConfig", num_local_experts=2, num_experts_per_tok=1, sliding_window=None)
parallel = _text("CohereForCausalLM", "CohereConfig", tie_word_embeddings=False)
# what a layer adds to the residual stream is not its FFN's output: normed behind it (two kinds), scaled, or of two FFNs
OTHER_LAYERS = {
    "gemma2": (_text("Gemma2ForCausalLM", "Gemma2Config", head_dim=8), "normed"),
    "olmo2": (_text("Olmo2ForCausalLM", "Olmo2Config"), "normed"),
    "granite": (_text("GraniteForCausalLM", "GraniteConfig", residual_multiplier=0.5), "scaled"),
    "granitemoeshared": (
        _text("GraniteMoeSharedForCausalLM", "GraniteMoeSharedConfig", num_local_experts=2, num_experts_per_tok=1,
              shared_intermediate_size=16),
        "2 feed-forward modules",
    ),
}  # fmt: skip


def states_of(model: nn.Module, batch: dict[str, Any]) -> tuple[dict[str, list[Tensor]], list[Tensor]]:
    """Return every state by name, and every layer's input."""
    spec, found, inputs = decoder_of(model), {}, []
    hooks = [layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0])) for layer in spec.layers]
    for state in STATES:
        inputs.clear()
        with recorded(spec, state) as seen:
            logits(model, batch)
        found[state] = list(seen)
    for hook in hooks:
        hook.remove()
    return found, inputs


@pytest.mark.parametrize("family", [*FAMILIES, "mixtral"])
def test_a_layers_states_are_its_sums(family: str, tiny: Any, inputs: Any) -> None:
    torch.manual_seed(0)
    model = mixtral().eval() if family == "mixtral" else tiny(family, dtype=torch.float64)
    found, entering = states_of(model, inputs(model))
    assert len(entering) == decoder_of(model).num_layers
    for layer, h in enumerate(entering):
        a, middle, m, out = (found[state][layer] for state in STATES)
        assert torch.equal(middle, h + a) and torch.equal(out, middle + m)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in decoder_of(model).decoder.modules())
    assert not any("forward" in vars(module) for module in model.modules())


def test_to_find_the_ffn_disturbs_no_one_who_listens(tiny: Any, inputs: Any) -> None:
    model = tiny("mistral")
    spec, batch = decoder_of(model), inputs(model)
    names = [name for name, _ in model.named_modules()]
    with recorded(spec, "attention") as a, recorded(spec, "residual") as out, recorded(spec, "mlp") as m:
        assert not a and not out and [name for name, _ in model.named_modules()] == names
        logits(model, batch)
    assert {len(seen) for seen in (a, out, m)} == {3} and {tuple(x.shape) for x in (*a, *out, *m)} == {(2, 12, 32)}


def test_a_parallel_block_has_an_ffn_and_no_stream_before_it(inputs: Any) -> None:
    model = parallel().double().eval()
    spec, batch = decoder_of(model), inputs(model)
    entering: list[Tensor] = []
    hook = spec.layers[1].register_forward_pre_hook(lambda _, args: entering.append(args[0]))
    with recorded(spec, "mlp") as m, recorded(spec, "attention") as a, recorded(spec, "residual") as out:
        logits(model, batch)
    hook.remove()
    torch.testing.assert_close(out[1], entering[0] + a[1] + m[1], rtol=0, atol=1e-14)
    with pytest.raises(InputError, match="cohere does not read the residual stream between .*point: attention"):
        modules_at(spec, "residual-mid")


@pytest.mark.parametrize("kind", OTHER_LAYERS)
def test_an_ffn_whose_output_is_not_what_is_added_is_refused(kind: str) -> None:
    make, why = OTHER_LAYERS[kind]
    model = make().eval()
    with pytest.raises(InputError, match=f"{why}.*point: residual"):
        adapters.create("live", model)
    live = adapters.create("live", model, point="residual")  # the layer's own output is there in any decoder
    with adapters.attach(model, stirred(live)):
        logits(model, {"input_ids": torch.arange(3, 9)[None]})
    assert not any("forward" in vars(module) or module._forward_pre_hooks for module in model.modules())


def test_what_is_not_kept_is_let_go(tiny: Any, inputs: Any) -> None:
    model = tiny("mistral")
    with recorded(decoder_of(model), "mlp", lambda state: state[:, -2:].clone()) as seen:
        logits(model, inputs(model))
    assert [tuple(state.shape) for state in seen] == [(2, 2, 32)] * 3
    assert all(state.untyped_storage().nbytes() == state.numel() * 4 for state in seen)


Edit = Callable[[int, Tensor], Tensor]


def by_hand(model: Any, ids: Tensor, at: str, edit: Edit) -> tuple[Tensor, dict[str, list[Tensor]]]:
    """Run a Mistral layer by layer, with `edit` at one state; return the logits, and the states as edited."""
    decoder = model.model
    h, length = decoder.embed_tokens(ids), ids.shape[1]
    mask = torch.full((length, length), float("-inf"), dtype=h.dtype).triu(1)[None, None]
    positions = decoder.rotary_emb(h, torch.arange(length)[None])
    seen: dict[str, list[Tensor]] = {state: [] for state in STATES}
    for index, layer in enumerate(decoder.layers):

        def take(state: str, value: Tensor, index: int = index) -> Tensor:
            value = edit(index, value) if state == at else value
            seen[state].append(value)
            return value

        a, _ = layer.self_attn(layer.input_layernorm(h), position_embeddings=positions, attention_mask=mask)
        middle = take("residual-mid", h + take("attention", a))
        m = take("mlp", layer.mlp(layer.post_attention_layernorm(middle)))
        h = take("residual", middle + m)
    return model.lm_head(decoder.norm(h)), seen


@contextmanager
def precise_norms() -> Iterator[None]:
    """Let Mistral's norms stay in the dtype of their input: transformers' own go through fp32."""
    from transformers.models.mistral.modeling_mistral import MistralRMSNorm

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            MistralRMSNorm, "forward",
            lambda norm, x: norm.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon),
        )  # fmt: skip
        yield


@pytest.mark.parametrize("point", POINTS)
def test_live_is_its_equation_at_both_points(point: str, tiny: Any, inputs: Any) -> None:
    model = tiny("mistral", dtype=torch.float64)
    ids = inputs(model)["input_ids"]
    adapter = stirred(adapters.create("live", model, point=point)).double()

    def shifted(layer: int, x: Tensor) -> Tensor:
        moved = x + adapter.magnitude[layer] * adapter.direction[layer]
        return moved * x.norm(dim=-1, keepdim=True) / moved.norm(dim=-1, keepdim=True)

    gradients = []
    with precise_norms():
        expected, seen = by_hand(model, ids, point, shifted)
        gradients.append(torch.autograd.grad(expected.square().mean(), list(adapter.parameters())))
        with adapters.attach(model, adapter), recorded(decoder_of(model), point) as states:
            found = model(input_ids=ids).logits
        gradients.append(torch.autograd.grad(found.square().mean(), list(adapter.parameters())))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    for mine, its in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-10, atol=1e-12)
    for mine, its in zip(states, seen[point], strict=True):  # whoever records sees the edited state
        torch.testing.assert_close(mine, its, rtol=0, atol=1e-12)


def test_a_plain_shift_is_one_function_at_both_points_and_lives_is_two(tiny: Any, inputs: Any) -> None:
    """(h + m) + v = h + (m + v): only what restores the norm, of m or of h + m, tells the points apart."""
    model = tiny("mistral", dtype=torch.float64)
    ids = inputs(model)["input_ids"]
    shift = stirred(nn.ParameterList([nn.Parameter(torch.zeros(32))] * 3)).double()
    with torch.no_grad():
        plain = [by_hand(model, ids, point, lambda layer, x: x + shift[layer])[0] for point in POINTS]
    torch.testing.assert_close(*plain, rtol=0, atol=1e-6)  # norms are fp32
    found = []
    for point in POINTS:
        adapter = stirred(adapters.create("live", model, point=point)).double()
        with adapters.attach(model, adapter):
            found.append(logits(model, {"input_ids": ids}))
    assert (found[0] - found[1]).abs().max() > 1e-2
