"""A wrapped model under transformers' own Trainer, TRL's and a loop: the adapter alone learns and is saved."""

from __future__ import annotations

import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from transformers import Trainer, TrainingArguments

from pipeline import adapters
from pipeline.core.errors import InputError
from tests.adapters.conftest import FAMILIES, logits, stirred
from tests.conftest import ROOT

METHODS = ["hificl", "mimic", "live", "lora", "mimic+lora", "peft"]


def settings(folder: Path, **given: Any) -> TrainingArguments:
    return TrainingArguments(
        **{
            "output_dir": str(folder), "per_device_train_batch_size": 2, "max_steps": 4, "logging_steps": 1,
            "learning_rate": 5e-2, "use_cpu": True, "save_steps": 4, "report_to": [], "disable_tqdm": True, **given,
        }
    )  # fmt: skip


def rows(model: nn.Module, inputs: Any) -> list[dict[str, torch.Tensor]]:
    batch = inputs(model, batch=4)
    return [{**{name: x[i] for name, x in batch.items()}, "labels": batch["input_ids"][i]} for i in range(4)]


@pytest.mark.parametrize("method", METHODS)
def test_a_trainer_trains_and_saves_the_adapter_alone(method: str, tiny: Any, inputs: Any, tmp_path: Path) -> None:
    model = tiny("idefics2")
    kind, before = type(model), {name: x.clone() for name, x in model.state_dict().items()}
    wrapped = adapters.wrap(model, method)
    start = {name: x.detach().clone() for name, x in wrapped.adapter.named_parameters()}
    trainer = Trainer(model=wrapped, args=settings(tmp_path), train_dataset=rows(model, inputs))
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[-1] < losses[0]
    assert all(not torch.equal(x, start[name]) for name, x in wrapped.adapter.named_parameters())
    kept = {"adapter_config.json", "adapter_model.safetensors"}
    assert kept <= {path.name for path in (tmp_path / "checkpoint-4").iterdir()}
    assert not list((tmp_path / "checkpoint-4").glob("model*.safetensors"))
    wrapped.eval()
    batch = inputs(model)
    learnt, answer = logits(wrapped, batch), wrapped.generate(**batch, max_new_tokens=3, do_sample=False)
    plain = wrapped.unwrap()
    assert type(plain) is kind and plain is model and not hasattr(plain, "adapter")
    after = plain.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(x, before[name]) for name, x in after.items())
    with adapters.attach(plain, adapters.load(tmp_path / "checkpoint-4", plain)):
        assert torch.equal(logits(plain, batch), learnt)
        assert torch.equal(plain.generate(**batch, max_new_tokens=3, do_sample=False), answer)


@pytest.mark.parametrize("method", ["hificl", "live", "lora"])
def test_a_bare_loop_and_gradient_checkpointing_give_the_same_gradients(method: str, tiny: Any, inputs: Any) -> None:
    gradients = []
    for checkpointed in (False, True):
        model = tiny("llava", attention_dropout=0.5)  # the frozen backbone drops nothing
        wrapped = adapters.wrap(model, method, **({"dropout": 0.0} if method == "lora" else {})).train()
        if checkpointed:
            wrapped.gradient_checkpointing_enable()
        batch = inputs(model)
        wrapped(**batch, labels=batch["input_ids"]).loss.backward()
        trained = {name for name, x in wrapped.named_parameters() if x.grad is not None}
        assert {id(x) for name, x in wrapped.named_parameters() if name in trained} == {
            id(x) for x in wrapped.adapter.parameters()
        }
        gradients.append([x.grad for x in wrapped.adapter.parameters()])
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(again, plain, rtol=1e-5, atol=1e-7)
    with pytest.raises(InputError, match="use_reentrant"):
        wrapped.gradient_checkpointing_enable({"use_reentrant": True})


@pytest.mark.parametrize("checkpointed", [False, True])
def test_the_backbone_computes_as_in_inference_while_the_adapter_trains(
    checkpointed: bool, tiny: Any, inputs: Any
) -> None:
    model = tiny("idefics", dropout=0.5)  # whose layers call functions of dropout themselves
    model.model.layers[1].train()
    modes = {name: module.training for name, module in model.named_modules()}
    batch = inputs(model)
    wrapped = adapters.wrap(model, stirred(adapters.create("hificl", model)))
    expected = logits(wrapped, batch)
    if checkpointed:
        wrapped.activation_checkpointing_enable()
    assert wrapped.train().training and wrapped.adapter.training
    trained = wrapped(**batch).logits
    torch.testing.assert_close(trained, expected, rtol=0, atol=1e-6)
    trained.sum().backward()
    assert all(x.grad is not None for x in wrapped.adapter.parameters())
    plain = wrapped.unwrap()
    assert {name: module.training for name, module in plain.named_modules()} == modes
    assert not plain.is_activation_checkpointing


@pytest.mark.parametrize("way", [{"do_sample": False}, {"num_beams": 3, "do_sample": False}, {"do_sample": True}])
def test_it_generates_while_it_trains_as_what_is_attached(way: Any, tiny: Any, inputs: Any) -> None:
    model = tiny("qwen2", num_key_value_heads=2)
    model.generation_config.eos_token_id = None
    adapter = stirred(adapters.create("lora", model, dropout=0.5))
    batch = inputs(model)
    batch["attention_mask"][1, :3] = 0  # padding on the left
    written = []
    with adapters.attach(model, adapter):
        torch.manual_seed(1)
        written.append(model.generate(**batch, max_new_tokens=5, **way))
    wrapped = adapters.wrap(model, adapter)
    wrapped.activation_checkpointing_enable()
    wrapped.train()
    torch.manual_seed(1)
    written.append(wrapped.generate(**batch, max_new_tokens=5, **way))
    assert torch.equal(*written) and wrapped.training and wrapped.adapter.training
    alone = wrapped.generate(batch["input_ids"][1:, 3:], max_new_tokens=5, do_sample=False)
    padded = wrapped.generate(**batch, max_new_tokens=5, do_sample=False)
    assert torch.equal(alone[0, -5:], padded[1, -5:])


def test_only_the_adapters_own_dropout_is_drawn(tiny: Any, inputs: Any) -> None:
    model = tiny("llava")
    wrapped = adapters.wrap(model, stirred(adapters.create("lora", model, dropout=0.5)))
    batch = inputs(model)
    first, again = logits(wrapped.train(), batch), logits(wrapped, batch)
    assert not torch.equal(first, again)
    assert torch.equal(logits(wrapped.eval(), batch), logits(wrapped, batch))


def test_attach_is_not_trained_silently_by_a_trainer(tiny: Any, inputs: Any, tmp_path: Path) -> None:
    model = tiny("llava")
    adapter = adapters.create("hificl", model)

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.adapter = model, adapter

        def forward(self, **batch: Any) -> Any:
            return self.model(**batch)

    data = rows(model, inputs)
    with adapters.attach(model, adapter):
        with pytest.raises(InputError, match="attach: .*nothing would be trained. Train adapters.wrap"):
            Trainer(model=model, args=settings(tmp_path), train_dataset=data).train()
    with adapters.attach(model, adapter):  # one whose model has the parameters is left alone
        start = adapter.k_b.clone()
        arguments = settings(tmp_path, remove_unused_columns=False, save_strategy="no", max_steps=1)
        Trainer(model=Both(), args=arguments, train_dataset=data).train()
        assert not torch.equal(adapter.k_b, start)


def test_the_prompt_is_saved_and_asked(tiny_loaded: Any, tmp_path: Path) -> None:
    from PIL import Image

    loaded, image = tiny_loaded, Image.new("RGB", (40, 30), "red")
    wrapped = adapters.wrap(
        loaded.model, "hificl", processor=loaded.processor, prompt="Image: {image} Question: {question} Answer:"
    )
    wrapped.adapter.v_b.data.fill_(0.5)
    answer = wrapped.ask(image, "What <image> is it?", max_new_tokens=4)
    text = f"Image: {loaded.processor.image_token} Question: What < image> is it? Answer:"
    batch = loaded.processor(text=[text], images=[[image]], return_tensors="pt")
    written = wrapped.generate(**batch, max_new_tokens=4, do_sample=False)[0, batch["input_ids"].shape[1] :]
    expected = loaded.processor.tokenizer.decode(written, skip_special_tokens=True).partition("\n")[0].strip()
    assert answer == expected
    wrapped.save_pretrained(tmp_path)
    plain = wrapped.unwrap()
    again = adapters.wrap(plain, adapters.load(tmp_path, plain), processor=loaded.processor)
    assert again.ask(image, "What <image> is it?", max_new_tokens=4) == answer
    again.unwrap()
    with pytest.raises(InputError, match="no prompt to ask with.*Give `wrap` the prompt"):
        adapters.wrap(plain, "hificl", processor=loaded.processor).ask(image, "What is it?")


@pytest.fixture
def tiny_loaded() -> Any:
    from pipeline import backbones

    return backbones.load("idefics2-8b-base", variant="tiny")


def test_trl_trains_the_adapter_alone(tmp_path: Path) -> None:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    from pipeline import backbones

    loaded = backbones.load("llava-interleave-7b", variant="tiny")
    wrapped = adapters.wrap(loaded.model, "hificl")
    start = {name: x.clone() for name, x in wrapped.adapter.state_dict().items()}
    data = Dataset.from_dict({"text": ["Question: What is it? Answer: a dog\n"] * 4})
    arguments = SFTConfig(
        output_dir=str(tmp_path), per_device_train_batch_size=2, max_steps=2, learning_rate=5e-2, use_cpu=True,
        bf16=False, save_steps=2, report_to=[], disable_tqdm=True, logging_steps=1,
    )  # fmt: skip
    trainer = SFTTrainer(model=wrapped, args=arguments, train_dataset=data, processing_class=loaded.tokenizer)
    trainer.train()
    assert any(not torch.equal(x, start[name]) for name, x in wrapped.adapter.state_dict().items())
    assert adapters.load(tmp_path / "checkpoint-2", wrapped.unwrap()).name == "hificl"


def _batch() -> dict[str, torch.Tensor]:
    ids = torch.arange(3, 51).view(4, 12)
    return {"input_ids": ids, "labels": ids}


def _learner(**given: Any) -> Any:
    torch.manual_seed(0)
    return adapters.wrap(FAMILIES["qwen2"]().eval(), "hificl", **given)


def _trained(folder: Path, rows: int) -> Any:
    """Train with a Trainer, two steps of all four rows, of which each process takes `rows`."""
    wrapped, data = _learner(), _batch()
    parallel = {"ddp_backend": "gloo", "ddp_timeout": 120} if dist.is_initialized() else {}
    arguments = settings(
        folder, per_device_train_batch_size=rows, max_steps=2, save_steps=2, optim="sgd", lr_scheduler_type="constant",
        gradient_checkpointing=True, **parallel,
    )  # fmt: skip
    Trainer(wrapped, arguments, train_dataset=[{name: x[i] for name, x in data.items()} for i in range(4)]).train()
    return wrapped


def _rank(folder: Path) -> None:
    """One of the two processes that torchrun starts: a Trainer, and a loop of one's own."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    rank = dist.get_rank()
    trained, wrapped = _trained(folder, rows=2), _learner()
    rows = {name: x[2 * rank : 2 * rank + 2] for name, x in _batch().items()}
    parallel = nn.parallel.DistributedDataParallel(wrapped)
    parallel(**rows).loss.backward()
    made = {"trained": trained.adapter.state_dict(), "gradients": [x.grad for x in wrapped.adapter.parameters()]}
    torch.save(made, folder / f"{rank}.pt")
    dist.barrier()
    os._exit(0)  # what gloo's threads do at an interpreter's end is not asked here


def test_ddp_averages_the_adapters_gradients_in_a_loop_and_in_a_trainer(tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "-m", "tests.adapters.test_wrap", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    whole = _learner()
    whole(**_batch()).loss.backward()
    torch.testing.assert_close(first["gradients"], [x.grad for x in whole.adapter.parameters()], rtol=1e-4, atol=1e-6)
    alone = _trained(tmp_path / "alone", rows=4)
    torch.testing.assert_close(first["trained"], alone.adapter.state_dict(), rtol=1e-4, atol=1e-6)
    saved = adapters.load(tmp_path / "checkpoint-2", alone.unwrap())
    torch.testing.assert_close(saved.state_dict(), first["trained"], rtol=0, atol=0)


if __name__ == "__main__":
    _rank(Path(sys.argv[1]))
