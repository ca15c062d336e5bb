"""The formulas against torch's own counter on tiny backbones, and against the designs' numbers on the real ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.support.shapes import CPU, Bench, Workload
from benchmarks.support.steps import Trained, floor_step
from pipeline import adapters, backbones
from pipeline.attention import softmax
from pipeline.attention.virtual import merge_attention
from pipeline.cost.flops import Costs, Prompt

REAL = ("idefics2-8b-base", "llava-interleave-7b")


def bench_of(name: str) -> Bench:
    """A small model whose attention is written out in matrix products, which the counter sees one by one."""
    small = CPU[name]
    bench = Bench(Workload(small.backbone, small.changes, small.pixels, small.visual_tokens, 26, batch=1), "cpu")
    bench.model.set_attn_implementation("eager")
    return bench


def counted(work: Any) -> float:
    with FlopCounterMode(display=False) as counter:
        work()
    return float(counter.get_total_flops())


def costs_of(bench: Bench) -> Costs:
    work = bench.workload
    size = work.pixels["pixel_values"][-2:]
    return Costs(backbones.get(work.backbone), bench.model, Prompt(work.text_tokens, work.answer_tokens), size)


@pytest.mark.parametrize("name", sorted(CPU))
def test_the_floor_is_what_the_counter_finds(name: str) -> None:
    bench = bench_of(name)
    assert costs_of(bench).floor() == pytest.approx(counted(floor_step(bench)), rel=1e-6)


@pytest.mark.parametrize("name", sorted(CPU))
def test_an_image_is_what_the_counter_finds(name: str) -> None:
    bench = bench_of(name)

    def encode() -> None:
        with torch.no_grad():
            bench.family.encode_images(bench.model, [bench.image])

    assert costs_of(bench).image.forward == pytest.approx(counted(encode), rel=1e-6)


@pytest.mark.parametrize("name", sorted(CPU))
def test_a_lora_step_is_what_the_counter_finds(name: str) -> None:
    bench = bench_of(name)
    adapter = adapters.create("lora", bench.model, rank=16)
    step, ids = Trained(bench, list(adapter.parameters())), bench.ids()
    with adapters.attach(bench.model, adapter):
        found = counted(lambda: step(ids, pixels=True))
    assert costs_of(bench).step("lora", {"rank": 16}).reused == pytest.approx(found, rel=0.03)


@pytest.mark.parametrize("n", [8, 64])
def test_what_virtual_tokens_add_is_what_the_counter_finds(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(softmax, "MOST_TOKENS", 0)  # the counter does not see into the CPU's masked attention
    heads, length, size = 4, 96, 32
    q, k, v = (torch.randn(1, heads, length, size, requires_grad=True) for _ in range(3))
    learned = [torch.randn(heads, n, size, requires_grad=True) for _ in range(2)]

    def merge() -> None:
        merge_attention(q, k, v, *learned).sum().backward()

    def half() -> None:
        merge_attention(q, k, v, *(x[:, : n // 2] for x in learned)).sum().backward()

    added = counted(merge) - counted(half)
    assert added == pytest.approx(12 * heads * size * length * (n // 2), rel=1e-6)


def test_the_real_backbones_cost_what_the_design_counted() -> None:
    tera = {}
    for name in REAL:
        costs = Costs(backbones.get(name), backbones.load(name, variant="meta").model)
        tera[name] = [
            x / 1e12
            for x in (
                costs.image.forward,
                costs.step("hificl").decoder,
                costs.step("lora", {"rank": 16}).whole,
                costs.step("mimic", shots=8).whole,
            )
        ]
    assert tera[REAL[0]] == pytest.approx([1.95, 2.53, 6.74, 33.2], rel=0.03)
    assert tera[REAL[1]] == pytest.approx([0.67, 20.4, 22.0, 148.6], rel=0.08)


def test_an_unknown_architecture_is_named() -> None:
    with pytest.raises(Exception, match="no cost formula"):
        loaded = backbones.load("qwen3-vl-8b", variant="meta")
        Costs(loaded.backbone, loaded.model)
