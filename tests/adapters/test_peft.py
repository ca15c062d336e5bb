"""Adapters that PEFT opens, and PEFT's own that open here: the same logits on a plain transformers model."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from pipeline import adapters
from pipeline.adapters.base import AdapterConfig
from pipeline.core.errors import InputError
from tests.adapters.conftest import logits, stirred

LORAS = [("lora", {"rank": 2}), ("lora", {"scope": "decoder", "alpha": 3.0}), ("lora-mini", {})]
each_lora = pytest.mark.parametrize(("method", "options"), LORAS, ids=["all", "decoder", "mini"])


@pytest.mark.parametrize("family", ["idefics2", "llava"])
@each_lora
def test_peft_opens_a_saved_lora(method: str, options: Any, family: str, tiny: Any, inputs: Any, tmp_path: Any) -> None:
    model = tiny(family)
    batch = inputs(model)
    adapter = stirred(adapters.create(method, model, **options))
    adapter.save_pretrained(tmp_path, extra={"trial": "abc"})
    with adapters.attach(model, adapter):
        ours = logits(model, batch)
        answer = model.generate(**batch, max_new_tokens=4, do_sample=False)
    base = logits(model, batch)
    theirs = PeftModel.from_pretrained(tiny(family), tmp_path)
    assert torch.equal(logits(theirs, batch), ours) and not torch.equal(ours, base)
    assert torch.equal(theirs.generate(**batch, max_new_tokens=4, do_sample=False), answer)
    assert adapters.read_config(tmp_path) == AdapterConfig(
        method, adapter.options.plain(), adapter.backbone, {"trial": "abc"}
    )


@each_lora
def test_a_saved_lora_has_nothing_that_vllm_refuses(method: str, options: Any, tiny: Any, tmp_path: Path) -> None:
    """Its checks of a folder, as version 0.33 has them: three fields there, ten unused, and names that it can read."""
    adapter = adapters.create(method, tiny("llava"), **options)
    adapter.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"] / config["r"]) == (adapter.options.rank, adapter.scaling)
    assert config["target_modules"] == sorted(adapter.module_names())
    assert config["bias"] == "none" and config["init_lora_weights"] is True
    unused = ("modules_to_save", "use_dora", "lora_bias", "alora_invocation_tokens", "layer_replication", "use_bdlora")
    assert not any(config[name] for name in (*unused, "use_qalora", "rank_pattern", "alpha_pattern"))
    names = [f"base_model.model.{name}.lora_{matrix}.weight" for name in adapter.module_names() for matrix in "AB"]
    assert sorted(load_file(tmp_path / "adapter_model.safetensors")) == sorted(names)


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": r".*layers\.[02]\.self_attn\.o_proj", "lora_alpha": 5},
        {"target_modules": ["down_proj"], "use_rslora": True, "r": 4, "layers_to_transform": [1]},
        {"target_modules": "all-linear", "lora_dropout": 0.1, "init_lora_weights": "gaussian"},
    ],
    ids=["names", "pattern", "rslora", "all"],
)
def test_pefts_own_lora_opens_here(config: Any, tiny: Any, inputs: Any, tmp_path: Path) -> None:
    theirs = get_peft_model(tiny("llava"), LoraConfig(**{"r": 2, **config})).eval()
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model = tiny("llava")
    batch = inputs(model)
    expected = logits(theirs, batch)
    theirs.save_pretrained(tmp_path)
    adapter = adapters.load(tmp_path, model)
    assert adapter.num_trainable() == sum(x.numel() for x in load_file(tmp_path / "adapter_model.safetensors").values())
    with adapters.attach(model, adapter):
        torch.testing.assert_close(logits(model, batch), expected, rtol=1e-6, atol=1e-6)
    assert not torch.equal(expected, logits(model, batch))
    adapter.save_pretrained(tmp_path / "again")  # where our own record says the same
    with adapters.attach(model, adapters.load(tmp_path / "again", model)):
        torch.testing.assert_close(logits(model, batch), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"use_dora": True}, "use_dora True"),
        ({"bias": "all"}, "bias 'all'"),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa'"),
        ({"made_up_later": 3}, "made_up_later 3"),
        ({"peft_type": "IA3"}, "PEFT's IA3 is no method here"),
        ({"r": 3}, r"tensor base_model\.model\.\S+lora_A\.weight: the configuration asks for \[3, 32\]"),
        ({"lora_alpha": None}, "not an adapter's configuration"),
    ],
)
def test_what_this_lora_does_not_have_is_refused(change: Any, problem: str, tiny: Any, tmp_path: Path) -> None:
    model = tiny("llava")
    get_peft_model(tiny("llava"), LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(InputError, match=problem):
        adapters.load(tmp_path, model)


@each_lora
def test_a_lora_of_before_pefts_layout_still_opens(method: str, options: Any, tiny: Any, tmp_path: Path) -> None:
    model = tiny("idefics2")
    adapter = stirred(adapters.create(method, model, **options))
    record = asdict(AdapterConfig(method, adapter.options.plain(), adapter.backbone, {"trial": "abc"}))
    (tmp_path / "adapter_config.json").write_text(json.dumps(record))
    save_file(adapter.state_dict(), tmp_path / "adapter_model.safetensors")
    again = adapters.load(tmp_path, model).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in adapter.state_dict().items())


def test_what_is_saved_over_another_leaves_nothing_of_it(tiny: Any, tmp_path: Path) -> None:
    model = tiny("llava")
    adapters.create("lora", model).save_pretrained(tmp_path)
    adapters.create("hificl", model).save_pretrained(tmp_path)
    assert adapters.load(tmp_path, model).name == "hificl"
