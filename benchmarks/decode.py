"""Cached decoding with an adapter against the frozen model: `hificl bench decode`.

python -m benchmarks.decode --device cuda
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from benchmarks.support.published import published_attention
from benchmarks.support.shapes import WORKLOADS, Bench, DecoderShape, Workload, decoder
from benchmarks.support.timing import Findings, alternate, main, one_thread, report
from pipeline import adapters
from pipeline.adapters.attach import attach, attention_forward
from pipeline.attention.softmax import repeat
from pipeline.backbones.decoder import decoder_of


@dataclass(frozen=True)
class Sizes:
    """What is measured: one layer's attention, and generation with an Idefics2."""

    # grouped heads as Mistral-7B has them; the layer's other sizes do not take part
    grouped: DecoderShape = DecoderShape(4096, 64, 1, 32, 8)
    cache: int = 1024
    batch: int = 8
    attention_repeats: int = 31
    other_repeats: int = 9  # of the slow formulations
    inner: int = 1
    new_tokens: int = 10
    generate_repeats: int = 11
    shots: tuple[int, ...] = (2, 4)
    dtype: str = "float32"


SIZES = {"cpu": Sizes(), "cuda": Sizes(inner=50, shots=(8, 16), dtype="bfloat16")}


def run(
    device: str = "cpu", *, sizes: Sizes | None = None, workloads: Mapping[str, Workload] | None = None
) -> dict[str, Any]:
    """Time one decoded token's attention over a cache, and whole generations, with an adapter and without.

    `decode_over_sdpa` is one layer's attention with HiFICL's virtual tokens over the same layer's plain SDPA as
    transformers calls it, with the heads of Mistral-7B (32 query heads of 128, 8 key heads); `_masked` has a padding
    mask. `published` and `concatenated` are other formulations of the same attention over plain SDPA.
    `generate_over_zero_shot` is `model.generate` of a fixed number of tokens with the adapter attached over the same
    without, visual tokens at hand; `icl_<k>_over_adapter` is generation behind k demonstrations, computed anew for each
    row, over the adapter's. On a CPU everything runs on one thread.

    Args:
        device: cpu or cuda.
        sizes: what is measured; None: the device's own.
        workloads: the models that generate; None: the device's Idefics2.
    """
    sizes = sizes or SIZES[device]
    chosen = workloads or {"idefics2": WORKLOADS[device]["idefics2"]}
    findings = Findings()
    with one_thread(device), torch.no_grad():
        attention_of_a_token(findings, sizes, device)
        for workload in chosen.values():
            _generation(findings, Bench(replace(workload, batch=sizes.batch), device), sizes, device)
    shown = {**asdict(sizes), **{name: asdict(workload) for name, workload in chosen.items()}}
    return report(findings, device=device, method=run.__doc__, sizes=shown)


def attention_of_a_token(findings: Findings, sizes: Sizes, device: str) -> None:
    """File one layer's attention of a decoded token over plain SDPA."""
    dtype = getattr(torch, sizes.dtype)
    model = decoder(sizes.grouped, device=device, dtype=dtype)
    spec = decoder_of(model)
    module: Any = spec.attentions[0]
    adapter = adapters.create("hificl", model)
    heads, kv_heads, size = spec.num_heads, spec.num_kv_heads, spec.head_dim
    q = torch.randn(sizes.batch, heads, 1, size, device=device, dtype=dtype)
    k, v = (torch.randn(sizes.batch, kv_heads, sizes.cache, size, device=device, dtype=dtype) for _ in range(2))
    seen = torch.ones(sizes.batch, 1, 1, sizes.cache, device=device, dtype=torch.bool)
    seen[0, ..., : sizes.cache // 4] = False
    tokens = adapter()
    k_learn, v_learn = tokens["keys"][0].to(dtype), tokens["values"][0].to(dtype)

    def concatenated() -> Tensor:
        full_k, full_v = (
            torch.cat([learned.expand(sizes.batch, -1, -1, -1), repeat(x, heads // kv_heads)], 2)
            for learned, x in ((k_learn, k), (v_learn, v))
        )
        return F.scaled_dot_product_attention(q, full_k, full_v, scale=module.scaling)

    with attach(model, adapter):
        spec.decoder(inputs_embeds=torch.zeros(1, 1, spec.hidden_size, device=device, dtype=dtype))
        callables: dict[str, Callable[[], Any]] = {
            "sdpa": lambda: sdpa_attention_forward(module, q, k, v, None, scaling=module.scaling),
            "ours": lambda: attention_forward(module, q, k, v, None, scaling=module.scaling),
            "sdpa_masked": lambda: sdpa_attention_forward(module, q, k, v, seen, scaling=module.scaling),
            "ours_masked": lambda: attention_forward(module, q, k, v, seen, scaling=module.scaling),
        }
        rounds = alternate(callables, sizes.attention_repeats, inner=sizes.inner, device=device)
        others: dict[str, Callable[[], Any]] = {
            "sdpa": callables["sdpa"],
            "published": lambda: published_attention(q, k, v, k_learn, v_learn, scale=module.scaling),
            "concatenated": concatenated,
        }
        slow = alternate(others, sizes.other_repeats, inner=sizes.inner, device=device)
    end = f"S{sizes.cache}_B{sizes.batch}"
    findings.add(f"decode_over_sdpa_{end}", rounds, "ours", "sdpa")
    findings.add(f"decode_over_sdpa_masked_{end}", rounds, "ours_masked", "sdpa_masked")
    findings.add(f"published_decode_over_sdpa_{end}", slow, "published", "sdpa")
    findings.add(f"concatenated_decode_over_sdpa_{end}", slow, "concatenated", "sdpa")
    findings.seconds(f"sdpa_seconds_{end}", rounds, "sdpa")


def _generation(findings: Findings, bench: Bench, sizes: Sizes, device: str) -> None:
    adapter = adapters.create("hificl", bench.model)
    settings: dict[str, Any] = {
        "do_sample": False, "use_cache": True, "min_new_tokens": sizes.new_tokens, "max_new_tokens": sizes.new_tokens,
    }  # fmt: skip

    def answer(shots: int) -> Callable[[], Any]:
        ids = bench.ids(shots)
        # evaluation pads on the left and hands a mask to every call
        mask = torch.ones_like(ids)
        mask[0, 0] = 0
        return lambda: bench.model.generate(**bench.inputs(ids), attention_mask=mask, **settings)

    plain = answer(0)

    def adapted() -> None:
        with attach(bench.model, adapter):
            plain()

    callables = {"zero_shot": plain, "adapter": adapted, **{str(shots): answer(shots) for shots in sizes.shots}}
    rounds = alternate(callables, sizes.generate_repeats, device=device)
    findings.add("generate_over_zero_shot", rounds, "adapter", "zero_shot")
    for shots in sizes.shots:
        findings.add(f"icl_{shots}_over_adapter", rounds, str(shots), "adapter")


if __name__ == "__main__":
    main(run)
