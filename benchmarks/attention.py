"""The frozen decoder with an adapter's attention against the decoder alone: `hificl bench attention`.

python -m benchmarks.attention --device cuda        # the shape of Mistral-7B, in bf16
python -m benchmarks.attention                      # one CPU thread, two minutes
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.support.published import Published
from benchmarks.support.shapes import MISTRAL_7B, DecoderShape, decoder
from benchmarks.support.timing import Findings, alternate, main, one_thread, report, saved_bytes
from pipeline import adapters
from pipeline.adapters.attach import attach
from pipeline.backbones.decoder import decoder_of


@dataclass(frozen=True)
class Sizes:
    """What is measured: the decoder, the lengths of a row, rows of a batch by length, and rounds."""

    decoder: DecoderShape
    lengths: tuple[int, ...] = (128, 512, 1024)
    tokens: int = 1024  # of a batch: short rows come in larger batches
    virtual_tokens: tuple[int, ...] = (8, 32, 128)  # growth, at the shortest length
    head_sizes: tuple[int, ...] = (32, 64, 128)  # growth, at the longest length
    repeats: int = 5
    dtype: str = "float32"


SIZES = {
    "cpu": Sizes(DecoderShape()),
    "cuda": Sizes(MISTRAL_7B, tokens=4096, repeats=30, dtype="bfloat16"),
}


def run(device: str = "cpu", *, sizes: Sizes | None = None) -> dict[str, Any]:
    """Time one training step of HiFICL and of MimIC against the floor, and the published formulation against ours.

    The floor is the frozen decoder alone: forward, and backward to its input embeddings, with a given gradient on the
    last hidden states. A step is forward, backward to the adapter's parameters and AdamW's update; rows carry no
    padding and no mask. `saved` counts the distinct storages that autograd keeps between forward and backward, weights
    left out. The published formulation (published.py) computes q K^T in full beside SDPA. The lowest layer's attention
    has no backward in a step, as nothing below it learns: with few layers that is a larger part of the step than with
    32; `step_over_floor_every_layer` is the step without that omission. On a CPU everything runs on one thread.

    Args:
        device: cpu or cuda.
        sizes: what is measured; None: the device's own.
    """
    sizes = sizes or SIZES[device]
    findings, growth = Findings(), {}
    with one_thread(device):
        model = decoder(sizes.decoder, device=device, dtype=getattr(torch, sizes.dtype))
        for length in sizes.lengths:
            _length(findings, model, sizes, device, length)
        growth = {
            "step_over_floor_by_virtual_tokens": _by_virtual_tokens(model, sizes, device),
            "published_over_ours_time_by_head_size": _by_head_size(sizes, device),
        }
    return report(findings, device=device, method=run.__doc__, sizes=asdict(sizes), growth=growth)


def _length(findings: Findings, model: nn.Module, sizes: Sizes, device: str, length: int) -> None:
    step = Steps(model, length, max(1, sizes.tokens // length))
    hificl = adapters.create("hificl", model, num_virtual_tokens=8, rank=8)
    mimic = adapters.create("mimic", model)
    published = Published(decoder_of(model))
    callables = {
        "floor": step.floor,
        "hificl": step.trained(partial(attach, model, hificl), hificl.parameters()),
        "mimic": step.trained(partial(attach, model, mimic), mimic.parameters()),
        "published": step.trained(_itself(published), published.parameters()),
        "every_layer": step.trained(partial(attach, model, hificl), hificl.parameters(), learns=True),
    }
    rounds = alternate(callables, sizes.repeats, device=device)
    findings.add(f"step_over_floor_every_layer_T{length}", rounds, "every_layer", "floor")
    findings.add(f"step_over_floor_T{length}", rounds, "hificl", "floor")
    findings.add(f"mimic_step_over_floor_T{length}", rounds, "mimic", "floor")
    findings.add(f"published_over_ours_time_T{length}", rounds, "published", "hificl")
    findings.add(f"published_over_floor_T{length}", rounds, "published", "floor")
    findings.seconds(f"floor_seconds_T{length}", rounds, "floor")
    with attach(model, hificl):
        ours = saved_bytes(step.forward, model)
    with published:
        theirs = saved_bytes(step.forward, model)
    floor = saved_bytes(lambda: step.forward(learns=True), model)
    for label, value in (("published_over_ours", theirs / ours), ("hificl_over_floor", ours / floor)):
        findings.ratios[f"{label}_saved_T{length}"], findings.spread[f"{label}_saved_T{length}"] = value, [value, value]


def _by_virtual_tokens(model: nn.Module, sizes: Sizes, device: str) -> dict[str, float]:
    step = Steps(model, sizes.lengths[0], max(1, sizes.tokens // sizes.lengths[0]))
    made = {n: adapters.create("hificl", model, num_virtual_tokens=n, rank=8) for n in sizes.virtual_tokens}
    callables: dict[str, Callable[[], Any]] = {"floor": step.floor}
    for n, adapter in made.items():
        callables[str(n)] = step.trained(partial(attach, model, adapter), adapter.parameters())
    rounds = alternate(callables, max(3, sizes.repeats // 3), device=device)
    return {str(n): rounds.ratio(str(n), "floor") for n in made}


def _itself(context: Published) -> Callable[[], Published]:
    return lambda: context


def _by_head_size(sizes: Sizes, device: str) -> dict[str, float]:
    """Return what the published formulation costs over ours with the same width in fewer, larger heads."""
    ratios = {}
    for size in sizes.head_sizes:
        heads = max(1, sizes.decoder.hidden // size)
        shape = replace(sizes.decoder, layers=2, heads=heads, kv_heads=max(1, heads // 4))
        model = decoder(shape, device=device, dtype=getattr(torch, sizes.dtype))
        step = Steps(model, sizes.lengths[-1], max(1, sizes.tokens // sizes.lengths[-1]))
        hificl, published = adapters.create("hificl", model), Published(decoder_of(model))
        callables = {
            "hificl": step.trained(partial(attach, model, hificl), hificl.parameters()),
            "published": step.trained(_itself(published), published.parameters()),
        }
        ratios[str(size)] = alternate(callables, max(3, sizes.repeats // 3), device=device).ratio("published", "hificl")
    return ratios


class Steps:
    """Steps over one made-up batch of hidden states.

    Args:
        model: a frozen decoder.
        length: tokens of a row.
        batch: rows.
    """

    def __init__(self, model: Any, length: int, batch: int) -> None:
        self.model = model
        like = next(model.parameters())
        generator = torch.Generator().manual_seed(0)
        shape = (batch, length, decoder_of(model).hidden_size)
        self.embeddings, self.gradient = (
            torch.randn(shape, generator=generator).to(like.device, like.dtype) for _ in range(2)
        )

    def forward(self, learns: bool = False) -> Tensor:
        """Return the last hidden states; with `learns`, of input embeddings that want a gradient."""
        inputs = self.embeddings.detach().requires_grad_(learns)
        return decoder_of(self.model).decoder(inputs_embeds=inputs, use_cache=False).last_hidden_state

    def floor(self) -> None:
        """Run the frozen decoder forward, and backward to its input embeddings."""
        self.forward(learns=True).backward(self.gradient)

    def trained(
        self, context: Callable[[], AbstractContextManager[Any]], parameters: Any, *, learns: bool = False
    ) -> Callable[[], None]:
        """Return a training step inside `context`; with `learns` its backward goes on to the input embeddings."""
        trained: Sequence[nn.Parameter] = list(parameters)
        optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)

        def step() -> None:
            with ExitStack() as stack:
                stack.enter_context(context())
                self.forward(learns).backward(self.gradient)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)

        return step


if __name__ == "__main__":
    main(run)
