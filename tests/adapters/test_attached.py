"""Whole models with an adapter in them: other families, generation, checkpointing, and adapters within each other."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pipeline import adapters
from pipeline.core.errors import InputError
from tests.adapters.conftest import IMAGE, logits, stirred

MODELS = ["idefics2", "llava"]
OTHERS = ["mistral", "qwen2", "llama", "llava_next", "llava_onevision", "qwen3_vl", "idefics"]


@pytest.mark.parametrize("family", OTHERS)
@pytest.mark.parametrize(
    ("method", "options"), [("hificl", {}), ("mimic", {}), ("live", {}), ("live", {"point": "residual"})]
)
def test_other_families(family: str, method: str, options: dict[str, Any], tiny: Any, inputs: Any) -> None:
    model = tiny(family)
    batch = inputs(model)
    base = logits(model, batch)
    adapter = stirred(adapters.create(method, model, **options))
    with adapters.attach(model, adapter):
        edited = model(**batch).logits
        edited.square().mean().backward()
    assert not torch.equal(edited, base) and torch.equal(logits(model, batch), base)
    assert all(p.grad.abs().sum() > 0 for p in adapter.parameters())


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("method", ["hificl", "mimic", "live", "lora"])
@pytest.mark.parametrize(
    "generation",
    [
        {},
        {"num_beams": 3, "length_penalty": 0.0},
        {"cache_implementation": "static"},
        {"use_cache": False},
    ],
    ids=str,
)
def test_generate_agrees_with_and_without_a_cache(
    family: str, method: str, generation: dict[str, Any], tiny: Any, inputs: Any
) -> None:
    model = tiny(family, dtype=torch.float64)
    model.generation_config.eos_token_id = None
    adapter = stirred(adapters.create(method, model)).double()
    batch = inputs(model)
    batch["attention_mask"] = batch["attention_mask"].clone()
    batch["attention_mask"][0, 0] = 0  # one row is left-padded
    # a random model may write the image token, which the uncached forward would take for an image
    common = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "suppress_tokens": [IMAGE]}
    with adapters.attach(model, adapter):
        found = model.generate(**batch, **common, **generation)
        plain = {k: v for k, v in generation.items() if k not in ("cache_implementation", "use_cache")}
        assert torch.equal(found, model.generate(**batch, **common, **plain, use_cache=False))
        assert torch.equal(found, model.generate(**batch, **common, **plain))


def test_a_sliding_window_is_respected(tiny: Any, inputs: Any) -> None:
    model = tiny("mistral", sliding_window=4, num_hidden_layers=1)
    adapter = stirred(adapters.create("hificl", model))
    batch = inputs(model)
    with adapters.attach(model, adapter):
        before = logits(model, batch)
        batch["input_ids"][:, 0] = 7
        moved = (logits(model, batch) - before).abs().amax((0, 2)) > 0
    assert moved[:4].all() and not moved[4:].any()


@pytest.mark.parametrize("method", ["hificl", "live"])
def test_gradient_checkpointing_gives_the_same_gradients(method: str, tiny: Any, inputs: Any) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = tiny("idefics2", dtype=torch.float64).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        adapter = stirred(adapters.create(method, model)).double()
        with adapters.attach(model, adapter):
            model(**inputs(model), use_cache=False).logits.square().mean().backward()
        gradients.append([p.grad for p in adapter.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("outer", "inner"), [("lora", "mimic"), ("mimic", "lora"), ("live", "hificl")])
def test_blocks_nest_where_they_edit_different_things(outer: str, inner: str, tiny: Any, inputs: Any) -> None:
    model = tiny("llava")
    batch = inputs(model)
    base = logits(model, batch)
    one, two = (stirred(adapters.create(m, model)) for m in (outer, inner))
    with adapters.attach(model, one), adapters.attach(model, two):
        model(**batch).logits.square().mean().backward()
    assert all(p.grad is not None for p in (*one.parameters(), *two.parameters()))
    assert torch.equal(logits(model, batch), base)


@pytest.mark.parametrize("pair", [("hificl", "mimic"), ("live", "live"), ("lora", "lora-mini")])
def test_the_same_place_is_not_edited_twice(pair: tuple[str, str], tiny: Any, inputs: Any) -> None:
    model = tiny("llava")
    batch = inputs(model)
    base = logits(model, batch)
    one, two = (adapters.create(m, model) for m in pair)
    with pytest.raises(InputError), adapters.attach(model, one), adapters.attach(model, two):
        pass
    assert torch.equal(logits(model, batch), base)


def test_combined_equals_its_parts_nested(tiny: Any, inputs: Any) -> None:
    model = tiny("idefics2")
    both = stirred(adapters.create("mimic+lora", model, lora={"rank": 2}))
    with adapters.attach(model, both):
        expected = logits(model, inputs(model))
    with adapters.attach(model, both.parts[1]), adapters.attach(model, both.parts[0]):
        assert torch.equal(logits(model, inputs(model)), expected)


def test_lora_equals_its_formula_and_drops_out_in_training_alone(tiny: Any, inputs: Any) -> None:
    model = tiny("mistral", dtype=torch.float64, num_hidden_layers=1)
    adapter = stirred(adapters.create("lora", model, rank=2, dropout=0.5)).double()
    batch = inputs(model)
    with adapters.attach(model, adapter):
        found = logits(model, batch)
    with adapters.attach(model, adapter.train()):
        assert not torch.equal(logits(model, batch), logits(model, batch))
    with torch.no_grad():
        for key in adapter.a:
            model.get_submodule(key.replace("/", ".")).weight += 2.0 * adapter.b[key] @ adapter.a[key]
    torch.testing.assert_close(logits(model, batch), found, rtol=0, atol=1e-12)
