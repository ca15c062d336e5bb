"""Virtual tokens as PEFT's prefixes, and any method as a module that needs this package no more: the same logits."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from pipeline import adapters
from pipeline.adapters.peft import Exported, export
from pipeline.core.errors import InputError
from tests.adapters.conftest import FAMILIES, logits, stirred

KV = {"heads": "kv"}
# query heads = key heads (llava), groups of two (Idefics2, Qwen), and of four whose heads are wider than D / H (llama)
PREFIXES = [
    ("llava", {}, {}), ("idefics2", {}, KV), ("qwen2", {"num_key_value_heads": 2}, KV), ("llava_onevision", {}, KV),
    ("llama", {}, {**KV, "lowrank_k": False}),
]  # fmt: skip
WAYS = [{"do_sample": False}, {"num_beams": 3, "do_sample": False}, {"do_sample": True}]


def left_padded(batch: dict[str, Any]) -> dict[str, Any]:
    """Put two tokens of padding before the second row, where no picture stands in the way."""
    mask = batch["attention_mask"].clone()
    if "pixel_values" not in batch:
        mask[1, :2] = 0
    return {**batch, "attention_mask": mask}


def answers(model: Any, batch: dict[str, Any]) -> list[torch.Tensor]:
    made = []
    for way in WAYS:
        torch.manual_seed(1)
        made.append(model.generate(**left_padded(batch), max_new_tokens=5, **way))
    return made


@pytest.mark.parametrize("form", ["peft", "peft-prefix"])
@pytest.mark.parametrize(("family", "over", "options"), PREFIXES, ids=[family for family, *_ in PREFIXES])
def test_peft_computes_with_exported_virtual_tokens(
    family: str, over: Any, options: Any, form: Any, tiny: Any, inputs: Any, tmp_path: Path
) -> None:
    model = tiny(family, **over)
    batch = inputs(model)
    adapter = stirred(adapters.create("hificl", model, num_virtual_tokens=5, rank=3, **options))
    base = logits(model, batch)
    with adapters.attach(model, adapter):
        ours, written = logits(model, batch), answers(model, batch)
    with torch.device("meta"):
        meta = FAMILIES[family](**over)
    exported = export(adapter, meta, form, tmp_path)
    assert exported == Exported({"peft": "CARTRIDGE", "peft-prefix": "PREFIX_TUNING"}[form])
    theirs = PeftModel.from_pretrained(model, tmp_path).eval()
    assert (ours - base).abs().max() > 0.01
    torch.testing.assert_close(logits(theirs, batch), ours, rtol=0, atol=2e-6)
    assert all(torch.equal(*both) for both in zip(answers(theirs, batch), written, strict=True))


def test_context_tuning_is_a_prefix_of_pefts(tiny: Any, inputs: Any, tmp_path: Path) -> None:
    model = tiny("idefics2")
    batch, adapter = inputs(model), stirred(adapters.create("ct-kv", model, num_virtual_tokens=4))
    with adapters.attach(model, adapter):
        ours = logits(model, batch)
    assert export(adapter, model, "peft", tmp_path) == Exported("CARTRIDGE")
    torch.testing.assert_close(
        logits(PeftModel.from_pretrained(model, tmp_path).eval(), batch), ours, rtol=0, atol=2e-6
    )


def test_heads_kv_has_the_tokens_of_key_heads_alone(tiny: Any, inputs: Any) -> None:
    model = tiny("idefics2")  # 3 layers of 4 heads of 8, 2 key heads
    shared = adapters.create("hificl", model, num_virtual_tokens=5, rank=3, heads="kv")
    assert shared.num_trainable() == 3 * 2 * 2 * 3 * (5 + 8)
    assert shared.options.plain()["heads"] == "kv"
    assert "heads" not in adapters.create("hificl", model).options.plain()  # keys of before stay
    whole = adapters.create("hificl", model, num_virtual_tokens=5, rank=3)
    stirred(shared)
    for name, parameter in whole.named_parameters():
        parameter.data = getattr(shared, name).data.repeat_interleave(2, 1)
    batch = inputs(model)
    with adapters.attach(model, shared):
        expected = logits(model, batch)
    with adapters.attach(model, whole):
        assert torch.equal(logits(model, batch), expected)


@pytest.mark.parametrize(
    ("family", "method", "options", "why"),
    [
        ("idefics2", "hificl", {}, "4 query heads have virtual tokens of their own.*heads: kv"),
        ("llava", "hificl", {"alpha": "one"}, "whole mass"),
        ("llava", "hificl", {"alpha_init": "identity"}, "logits beside s q.k"),
        ("llava", "mimic", {"shift": "blend"}, "logits beside s q.k"),
        ("llava", "mimic", {"shift": "linear"}, "depend on the query"),
        ("llava", "live", {}, "no such method"),
        ("llava", "hificl+lora", {}, "no such method"),
        ("qwen3_vl", "hificl", {"heads": "kv"}, "qwen3_vl has no one rotary embedding"),
        ("idefics", "hificl", {}, "idefics has no one rotary embedding"),
    ],
)
def test_what_a_prefix_cannot_hold_says_why(
    family: str, method: str, options: Any, why: str, tiny: Any, tmp_path: Path
) -> None:
    model = tiny(family)
    adapter = stirred(adapters.create(method, model, **options))
    with pytest.raises(InputError, match=f"method '{method.replace('+', '.')}': .*{why}"):
        export(adapter, model, "peft", tmp_path)


def test_a_sliding_window_ends_what_is_exact(tiny: Any, tmp_path: Path) -> None:
    model = tiny("mistral", sliding_window=64)
    adapter = adapters.create("hificl", model, num_virtual_tokens=5, heads="kv")
    assert export(adapter, model, "peft", tmp_path).exact_up_to == 59


MODULES = [
    ("hificl", {"alpha": "one"}), ("hificl", {"alpha_init": "identity"}), ("mimic", {}), ("mimic", {"shift": "linear"}),
    ("live", {}), ("live", {"point": "residual"}), ("prefix", {}),
]  # fmt: skip


@pytest.mark.parametrize("family", ["idefics2", "llava"])
@pytest.mark.parametrize(("method", "options"), MODULES, ids=["-".join([m, *map(str, o.values())]) for m, o in MODULES])
def test_a_module_computes_the_same_by_itself(
    method: str, options: Any, family: str, tiny: Any, inputs: Any, tmp_path: Path
) -> None:
    model = tiny(family)
    batch = inputs(model)
    adapter = stirred(adapters.create(method, model, **options))
    with adapters.attach(model, adapter):
        ours = logits(model, batch)
        answer = model.generate(**batch, max_new_tokens=4, do_sample=False)
    export(adapter, model, "module", tmp_path)
    spec: Any = importlib.util.spec_from_file_location("hificl_adapter", tmp_path / "hificl_adapter.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    plain = tiny(family)
    base = logits(plain, batch)
    with module.Adapter.from_pretrained(tmp_path).attached(plain):
        torch.testing.assert_close(logits(plain, batch), ours, rtol=0, atol=2e-6)
        assert torch.equal(plain.generate(**batch, max_new_tokens=4, do_sample=False), answer)
    assert torch.equal(logits(plain, batch), base) and not torch.equal(ours, base)
    with pytest.raises(ValueError, match=f"made for a {family}"):
        with module.Adapter.from_pretrained(tmp_path).attached(tiny("mistral")):
            pass


ELSEWHERE = """
import sys
sys.modules["pipeline"] = None  # to import it is an ImportError
import torch, transformers
torch.set_num_threads(1)
model = transformers.AutoModelForCausalLM.from_pretrained("model").eval()
batch = torch.load("batch.pt")
for name in sys.argv[1:]:
    sys.path.insert(0, name)
    sys.modules.pop("hificl_adapter", None)
    from hificl_adapter import Adapter
    sys.path.pop(0)
    adapter = Adapter.from_pretrained(name)
    assert isinstance(adapter, torch.nn.Module)
    with torch.no_grad(), adapter.attached(model):
        torch.save([model(**batch).logits, model.generate(**batch, max_new_tokens=4, do_sample=False)], f"{name}.pt")
"""


def test_a_module_needs_this_package_no_more(tiny: Any, inputs: Any, tmp_path: Path) -> None:
    """In a process that cannot import it, and knows the backbone by transformers alone."""
    model = tiny("qwen2", num_key_value_heads=2)
    batch, expected = inputs(model), {}
    model.save_pretrained(tmp_path / "model")
    torch.save(batch, tmp_path / "batch.pt")
    for method in ("mimic", "live", "hificl"):
        adapter = stirred(adapters.create(method, model))
        export(adapter, model, "module", tmp_path / method)
        with adapters.attach(model, adapter):
            expected[method] = logits(model, batch), model.generate(**batch, max_new_tokens=4, do_sample=False)
    command = [sys.executable, "-c", ELSEWHERE, *expected]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for method, (ours, answer) in expected.items():
        theirs, written = torch.load(tmp_path / f"{method}.pt")
        torch.testing.assert_close(theirs, ours, rtol=0, atol=2e-6)
        assert torch.equal(written, answer), method


def test_lora_is_no_module(tiny: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="LoRA's layers are PEFT's.*--to peft"):
        export(adapters.create("lora", tiny("llava")), tiny("llava"), "module", tmp_path)


@pytest.mark.parametrize("method", ["m2iv", "bottleneck", "prompt", "moe-hificl"])
def test_what_a_module_does_not_compute_is_refused(method: str, tiny: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="it computes what a module by itself does not"):
        export(adapters.create(method, tiny("llava")), tiny("llava"), "module", tmp_path)


def test_no_way_out_leads_back_to_where_it_came_from(tiny: Any, tmp_path: Path) -> None:
    for form in ("peft", "module"):
        with pytest.raises(InputError, match="Use it with this package"):
            export(adapters.create("peft", tiny("llava")), tiny("llava"), form, tmp_path)
