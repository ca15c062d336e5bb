"""One battery over every registered method, on tiny Idefics2 and LLaVA; a new method is tested when its file exists."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline import adapters
from pipeline.backbones.decoder import decoder_of
from pipeline.core.errors import InputError
from tests.adapters.conftest import logits, stirred

MODELS = ["idefics2", "llava"]
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in adapters.names()),
    ("hificl", {"num_virtual_tokens": 3, "rank": 2, "lowrank_k": False}),
    ("hificl", {"lowrank_v": False}),
    ("hificl", {"alpha": "one"}),
    ("hificl", {"alpha_init": "identity"}),
    ("hificl", {"teacher": True}),
    ("mimic", {"shift": "blend"}),
    ("mimic", {"shift": "linear"}),
    ("live", {"point": "residual"}),
    ("lora", {"scope": "decoder", "rank": 2}),
]
each_variant = pytest.mark.parametrize(
    ("method", "options"), VARIANTS, ids=["-".join([m, *map(str, o.values())]) for m, o in VARIANTS]
)


@pytest.mark.parametrize("family", MODELS)
@each_variant
def test_attach_edits_and_leaves_no_trace(
    family: str, method: str, options: dict[str, Any], tiny: Any, inputs: Any
) -> None:
    model = tiny(family)
    next(model.parameters()).requires_grad_(False)
    batch, spec = inputs(model), decoder_of(model)
    base, text, flags = logits(model, batch), spec.text_config.to_dict(), [p.requires_grad for p in model.parameters()]
    names, attributes = [n for n, _ in model.named_modules()], set(vars(model))
    adapter = stirred(adapters.create(method, model, **options))
    for _ in range(2):
        with adapters.attach(model, adapter):
            assert not torch.equal(logits(model, batch), base)
        assert torch.equal(logits(model, batch), base)
    with pytest.raises(ZeroDivisionError), adapters.attach(model, adapter):
        raise ZeroDivisionError
    assert torch.equal(logits(model, batch), base)
    assert spec.text_config.to_dict() == text and spec.text_config._attn_implementation == "sdpa"
    assert [p.requires_grad for p in model.parameters()] == flags
    assert [n for n, _ in model.named_modules()] == names and set(vars(model)) == attributes
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in spec.decoder.modules())


@pytest.mark.parametrize("family", MODELS)
@each_variant
def test_gradients_reach_the_adapter_alone(
    family: str, method: str, options: dict[str, Any], tiny: Any, inputs: Any
) -> None:
    model = tiny(family)
    adapter = stirred(adapters.create(method, model, **options))
    with adapters.attach(model, adapter):
        model(**inputs(model)).logits.float().square().mean().backward()
    assert all(p.grad is None for p in model.parameters())
    for name, parameter in adapter.named_parameters():
        assert parameter.dtype == torch.float32
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("family", MODELS)
@each_variant
def test_cached_decode_equals_full_forward(
    family: str, method: str, options: dict[str, Any], tiny: Any, inputs: Any
) -> None:
    model = tiny(family, dtype=torch.float64)
    adapter = stirred(adapters.create(method, model, **options)).double()
    batch = inputs(model)
    with adapters.attach(model, adapter), torch.no_grad():
        full = model(**batch).logits
        rest = {k: v for k, v in batch.items() if k not in ("input_ids", "attention_mask")}
        out = model(
            input_ids=batch["input_ids"][:, :8], attention_mask=batch["attention_mask"][:, :8], **rest, use_cache=True
        )
        for end in (9, 10, 12):
            start = out.past_key_values.get_seq_length()
            step = model(
                input_ids=batch["input_ids"][:, start:end],
                attention_mask=batch["attention_mask"][:, :end],
                past_key_values=out.past_key_values,
                use_cache=True,
            )
            torch.testing.assert_close(step.logits, full[:, start:end], rtol=0, atol=1e-10)


@pytest.mark.parametrize("family", MODELS)
@each_variant
def test_what_comes_after_moves_nothing_before(
    family: str, method: str, options: dict[str, Any], tiny: Any, inputs: Any
) -> None:
    model = tiny(family)
    adapter = stirred(adapters.create(method, model, **options))
    batch = inputs(model)
    with adapters.attach(model, adapter):
        before = logits(model, batch)
        batch["input_ids"] = batch["input_ids"].clone()
        batch["input_ids"][:, 9:] = batch["input_ids"][:, 9:].flip(-1) % 200 + 7
        after = logits(model, batch)
    assert (after - before)[:, :9].abs().max() == 0.0
    assert (after - before)[:, 9:].abs().max() > 0.0


@each_variant
def test_left_padding_changes_no_real_position(method: str, options: dict[str, Any], tiny: Any, inputs: Any) -> None:
    if method == "connector":
        pytest.skip("a text model has none")
    model = tiny("mistral", dtype=torch.float64)
    adapter = stirred(adapters.create(method, model, **options)).double()
    ids = inputs(model)["input_ids"]
    padded = torch.cat([torch.zeros(2, 4, dtype=torch.long), ids], 1)
    mask = (torch.arange(16) >= 4).long().expand(2, -1)
    with adapters.attach(model, adapter):
        expected = logits(model, {"input_ids": ids})
        found = logits(
            model, {"input_ids": padded, "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
        )
    assert torch.isfinite(found).all()
    torch.testing.assert_close(found[:, 4:], expected, rtol=0, atol=1e-10)


@each_variant
def test_saved_and_loaded_it_computes_the_same(
    method: str, options: dict[str, Any], tiny: Any, inputs: Any, tmp_path: Path
) -> None:
    model = tiny("idefics2")
    batch = inputs(model)
    adapter = stirred(adapters.create(method, model, **options))
    adapter.save_pretrained(tmp_path, extra={"trial": "abc"})
    record = ["hificl.json"] if method.startswith("lora") else []  # beside PEFT's own configuration
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors", *record]
    assert adapters.read_config(tmp_path).extra == {"trial": "abc"}
    loaded = adapters.load(tmp_path, model)
    with adapters.attach(model, adapter):
        expected = logits(model, batch)
    with adapters.attach(model, loaded):
        assert torch.equal(logits(model, batch), expected)
    # weights that were saved in half precision are read as fp32 again
    adapter.to(torch.bfloat16).save_pretrained(tmp_path)
    again = adapters.load(tmp_path, model)
    for (name, a), b in zip(again.named_parameters(), adapter.parameters(), strict=True):
        assert a.dtype == torch.float32 and torch.equal(a, b.float()), name


@each_variant
def test_the_seed_decides_the_initial_values(method: str, options: dict[str, Any], tiny: Any) -> None:
    model = tiny("llava")
    first = adapters.create(method, model, seed=1, **options).state_dict()
    torch.rand(7)
    second = adapters.create(method, model, seed=1, **options).state_dict()
    other = adapters.create(method, model, seed=2, **options).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


@each_variant
def test_parameter_groups_cover_every_parameter_once(method: str, options: dict[str, Any], tiny: Any) -> None:
    adapter = adapters.create(method, tiny("llava"), **options)
    groups = adapter.parameter_groups(5e-3, 0.05)
    assert sorted(id(p) for g in groups for p in g["params"]) == sorted(id(p) for p in adapter.parameters())
    assert all(set(g) == {"params", "lr", "weight_decay"} for g in groups)
    assert adapter.num_trainable() == sum(p.numel() for g in groups for p in g["params"])
    assert adapter.num_trainable() == sum(adapter.modules_trainable().values())


def test_biases_and_scalars_are_not_decayed_and_live_has_its_own_rate(tiny: Any) -> None:
    model = tiny("llava")
    live = adapters.create("live", model)
    by_size = {g["params"][0].shape[-1]: (g["lr"], g["weight_decay"]) for g in live.parameter_groups(5e-3, 0.05)}
    assert by_size == {32: (5e-3, 0.05), 1: (1e-2, 0.0)}
    mimic = adapters.create("mimic", model)
    undecayed = [p for g in mimic.parameter_groups(1e-3, 0.1) if g["weight_decay"] == 0 for p in g["params"]]
    assert [id(p) for p in undecayed] == [id(mimic.gate_bias)]
    both = adapters.create("mimic+lora", model)
    assert {g["lr"] for g in both.parameter_groups(5e-3, 0.0)} == {5e-3, 5e-4}


@pytest.mark.parametrize("method", adapters.names())
def test_another_backbone_is_refused_by_name(method: str, tiny: Any, tmp_path: Path) -> None:
    adapter = adapters.create(method, tiny("idefics2"))
    adapter.save_pretrained(tmp_path)
    for other, value in ((tiny("llava"), "model_type"), (tiny("idefics2", num_hidden_layers=2), "num_layers")):
        with pytest.raises(InputError, match=value), adapters.attach(other, adapter):
            pass
        with pytest.raises(InputError, match=value):
            adapters.load(tmp_path, other)


def test_bad_input_is_refused_with_a_way_out(tiny: Any, tmp_path: Path) -> None:
    model = tiny("llava")
    with pytest.raises(InputError, match="Did you mean 'hificl'"):
        adapters.create("hifcl", model)
    with pytest.raises(InputError, match="unknown option 'rnk'.*Did you mean 'rank'"):
        adapters.create("hificl", model, rnk=3)
    with pytest.raises(InputError, match="rank"):
        adapters.create("hificl", model, rank=0)
    with pytest.raises(InputError, match="lora.rnk"):
        adapters.create("mimic+lora", model, lora={"rnk": 3})
    with pytest.raises(InputError, match="decoder"):
        adapters.create("hificl", model.model.vision_tower)
    with pytest.raises(InputError, match="no such file"):
        adapters.load(tmp_path, model)
    adapters.create("hificl", model).save_pretrained(tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"torn")
    with pytest.raises(InputError, match="adapter_model.safetensors"):
        adapters.load(tmp_path, model)
    adapters.create("hificl", model, rank=2).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    config["options"]["rank"] = 3
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="tensor k_a"):
        adapters.load(tmp_path, model)
    (tmp_path / "adapter_config.json").write_text("[]")
    with pytest.raises(InputError, match="adapter_config.json"):
        adapters.load(tmp_path, model)
