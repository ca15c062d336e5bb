"""`method: peft`: what is attached is PEFT's own model, number by number; what PEFT cannot inject is refused."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.utils.cpp_extension  # BOFT needs setuptools, which cannot be imported after a look for pip
from peft import get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from pipeline import adapters
from pipeline.backbones.decoder import decoder_of
from pipeline.core.errors import InputError
from tests.adapters.conftest import logits, stirred

TUNERS: list[tuple[str, str, dict[str, Any], dict[str, Any]]] = [  # ours, PEFT's name, config, what the name adds
    ("lora", "LORA", {"r": 3, "lora_alpha": 5}, {}),
    ("dora", "LORA", {"r": 2}, {"use_dora": True}),
    ("rslora", "LORA", {"r": 4, "lora_alpha": 2}, {"use_rslora": True}),
    ("pissa", "LORA", {"r": 2}, {"init_lora_weights": "pissa"}),
    ("olora", "LORA", {"r": 2}, {"init_lora_weights": "olora"}),
    ("ia3", "IA3", {}, {"feedforward_modules": []}),
    ("vera", "VERA", {"r": 4}, {}),
    ("oft", "OFT", {"oft_block_size": 4}, {}),
    ("boft", "BOFT", {"boft_block_size": 4}, {}),
    ("loha", "LOHA", {"r": 2}, {}),
    ("lokr", "LOKR", {"r": 2}, {}),
    ("hra", "HRA", {"r": 2}, {}),
    ("shira", "SHIRA", {"r": 2}, {}),
    ("fourierft", "FOURIERFT", {"n_frequency": 20}, {}),
    ("randlora", "RANDLORA", {"r": 4}, {}),
    ("unilora", "UNILORA", {}, {}),
    ("delora", "DELORA", {"r": 2}, {}),
]


def own(model: Any, kind: str, config: dict[str, Any], seed: int) -> Any:
    """Return PEFT's model around a copy of `model`."""
    spec = decoder_of(model)
    inside = {id(m) for layer in spec.layers for m in layer.modules()}
    ends = ("q_proj", "k_proj", "v_proj", "o_proj")
    names = [n for n, m in model.named_modules() if id(m) in inside and n.rpartition(".")[2] in ends]
    kinds = {kind.value: config for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    torch.manual_seed(seed)
    return get_peft_model(copy.deepcopy(model), kinds[kind](target_modules=names, **config), adapter_name="hificl")


@pytest.mark.parametrize(("tuner", "kind", "config", "added"), TUNERS, ids=[t[0] for t in TUNERS])
def test_it_computes_what_pefts_own_model_computes(
    tuner: str, kind: str, config: dict[str, Any], added: dict[str, Any], tiny: Any, inputs: Any, tmp_path: Path
) -> None:
    model = tiny("idefics2")
    batch, weights = inputs(model), copy.deepcopy(model.state_dict())
    base = logits(model, batch)
    oracle = own(model, kind, {**config, **added}, seed=5)
    adapter = adapters.create("peft", model, seed=5, tuner=tuner, config=config)
    assert adapter.num_trainable() == oracle.get_nb_trainable_parameters()[0] > 0
    names = {f"base_model.model.{key.replace('/', '.')}": p for key, p in adapter.weights.items()}
    learns = {name: p for name, p in oracle.named_parameters() if p.requires_grad}
    assert names.keys() == learns.keys()
    for name, p in learns.items():  # drawn by the seed alone, as PEFT draws
        torch.testing.assert_close(names[name].data, p.data.float(), rtol=0, atol=0)
    stirred(adapter, std=0.1)
    with torch.no_grad():
        for name, p in learns.items():
            p.copy_(names[name])
    expected = oracle(**batch).logits
    expected.square().mean().backward()
    with adapters.attach(model, adapter):
        found = model(**batch).logits
        found.square().mean().backward()
    assert (expected - base).abs().max() > 1e-3
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    for name, p in learns.items():
        torch.testing.assert_close(names[name].grad, p.grad, rtol=1e-5, atol=1e-7)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    adapter.save_pretrained(tmp_path)
    with adapters.attach(model, adapters.load(tmp_path, model)):
        assert torch.equal(logits(model, batch), found)
    assert torch.equal(logits(model, batch), base)


def test_a_tuner_that_needs_setuptools_in_a_process_that_has_looked_for_pip() -> None:
    code = """
import importlib.util
importlib.util.find_spec("pip")
from pipeline import adapters
from pipeline.backbones import load
model = load("idefics-9b", variant="tiny").model
print(adapters.create("peft", model, tuner="boft", config={"boft_block_size": 4}).num_trainable())
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0 and int(run.stdout) > 0, run.stderr


@pytest.mark.parametrize("tuner", ["dora", "ia3", "vera", "oft"])
def test_a_half_precision_backbone_is_tuned_in_fp32(tuner: str, tiny: Any, inputs: Any) -> None:
    model = tiny("llava", dtype=torch.bfloat16)
    adapter = stirred(adapters.create("peft", model, tuner=tuner), std=0.1)
    with adapters.attach(model, adapter):
        out = model(**inputs(model)).logits
        out.float().square().mean().backward()
    assert out.dtype == torch.bfloat16
    assert all(p.dtype == p.grad.dtype == torch.float32 and p.grad.abs().sum() > 0 for p in adapter.parameters())


def test_dropout_acts_in_training_alone_and_a_teacher_is_possible(tiny: Any, inputs: Any) -> None:
    model = tiny("llava")
    adapter = stirred(adapters.create("peft", model, config={"lora_dropout": 0.5}, teacher=True))
    assert adapter.facts.drops and adapter.facts.kind == ("hidden", "mlp") and not adapter.packable
    batch = inputs(model)
    with adapters.attach(model, adapter):
        assert torch.equal(logits(model, batch), logits(model, batch))
    with adapters.attach(model, adapter.train()):
        assert not torch.equal(logits(model, batch), logits(model, batch))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tuner": "adalora"}, "ADALORA is steered by its own calls"),
        ({"tuner": "prefix_tuning"}, "injects ADAMSS, .*LORA"),
        ({"config": {"rank": 3}}, "config: .*unexpected keyword argument 'rank'"),
        ({"config": {"init_lora_weights": "eva"}}, "'eva' looks at data first"),
        ({"config": {"target_modules": ["q_proj"]}}, "target_modules are said by `targets`"),
        ({"config": {"bias": "all"}, "tuner": "lora", "scope": "all"}, "trains the backbone's own weights"),
        ({"tuner": "osf"}, "or edits gradients"),
        ({"tuner": "miss"}, r"MISS cannot be injected: `r` \(64\)"),
        ({"targets": ["q_prj"]}, "no module is named q_prj"),
    ],
)
def test_what_cannot_be_injected_is_refused_in_a_line(options: dict[str, Any], words: str, tiny: Any) -> None:
    model = tiny("idefics2")
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(InputError, match=words) as error:
        adapters.create("peft", model, **options)
    assert "\n" not in str(error.value) and [name for name, _ in model.named_modules()] == names


def test_pefts_layers_are_put_in_once(tiny: Any) -> None:
    model = tiny("llava")
    one, two = (adapters.create(method, model) for method in ("lora", "peft"))
    with pytest.raises(InputError, match="already"), adapters.attach(model, one), adapters.attach(model, two):
        pass
