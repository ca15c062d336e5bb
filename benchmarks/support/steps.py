"""One training step of each method on a workload: what the training loop does, without data and bookkeeping."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.support.shapes import Bench
from pipeline import adapters
from pipeline.adapters.base import Adapter
from pipeline.backbones.base import placed
from pipeline.backbones.states import recorded
from pipeline.train import loss

Step = Callable[..., None]


class Trained:
    """Forward, cross-entropy of the answer, backward, clip and AdamW; the adapter is attached by the caller.

    Args:
        bench: model and batches.
        parameters: what is trained.
        whole_logits: logits at every position, as transformers' own loss computes them, in place of the answer's alone.
    """

    def __init__(self, bench: Bench, parameters: Sequence[nn.Parameter], *, whole_logits: bool = False) -> None:
        self.bench, self.parameters, self.whole_logits = bench, list(parameters), whole_logits
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4, fused=True)

    def __call__(self, ids: Tensor, *, pixels: bool = False) -> None:
        """Run one step on token ids [B, T]."""
        self.finish(self.truth(self.bench.hidden(self.bench.inputs(ids, pixels=pixels)), ids))

    def truth(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """Return the mean cross-entropy of the answers."""
        return self.truths(hidden, ids).mean()

    def truths(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """Return the cross-entropy of each row's answer, [B]."""
        batch, length = ids.shape
        answer = self.bench.workload.answer_tokens
        rows = placed(torch.arange(batch).repeat_interleave(answer), ids.device)
        positions = placed(torch.arange(length - answer - 1, length - 1).repeat(batch), ids.device)
        targets = ids[:, -answer:].flatten()
        if self.whole_logits:
            logits = self.bench.model.get_output_embeddings()(hidden).float()[rows, positions]
        else:
            logits = loss.logits_at(self.bench.model, hidden, rows, positions)
        return loss.cross_entropy(logits, targets, rows, len(ids))

    def finish(self, value: Tensor) -> None:
        """Backward, clip, update."""
        value.backward()
        self.update()

    def update(self) -> None:
        """Clip and update by the gradients that are there."""
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


class Aligned(Trained):
    """MimIC's student: hidden states compared with given targets, plus half the cross-entropy."""

    def __call__(self, ids: Tensor, *, pixels: bool = False, targets: Sequence[Tensor] | None = None) -> None:
        """Run one step; `targets` are the teacher's states by sample, [L, T, D] (None: random ones, made once)."""
        batch, length = ids.shape
        with recorded(self.bench.spec, "mlp", lambda state: state.flatten(0, 1)) as states:
            hidden = self.bench.hidden(self.bench.inputs(ids, pixels=pixels))
        targets = targets or self._targets(states, batch, length)
        imitation = loss.alignment(states, targets).mean()
        self.finish(imitation + 0.5 * self.truth(hidden, ids))

    def _targets(self, states: Sequence[Tensor], batch: int, length: int) -> Sequence[Tensor]:
        if not hasattr(self, "_made"):
            self._made = torch.randn_like(torch.stack(list(states))).split([length] * batch, 1)
        return self._made


def teach(bench: Bench, ids: Tensor, length: int, *, pixels: bool = False) -> list[Tensor]:
    """Return the frozen model's states of the last `length` tokens behind demonstrations, by sample, [L, length, D]."""
    places = loss.tails(range(len(ids)), [ids.shape[1]] * len(ids), [length] * len(ids), ids.shape[1], ids.device)
    with torch.no_grad(), recorded(bench.spec, "mlp", loss.at(places)) as states:
        bench.hidden(bench.inputs(ids, pixels=pixels))
    return list(torch.stack(states).split(length, 1))


def floor_step(bench: Bench) -> Step:
    """Return the floor: the frozen decoder forward, and backward to its input embeddings."""
    with torch.no_grad():
        embeddings = bench.model.get_input_embeddings()(bench.ids())
    gradient = torch.randn_like(embeddings)

    def step() -> None:
        inputs = embeddings.detach().requires_grad_(True)
        bench.spec.decoder(inputs_embeds=inputs, use_cache=False).last_hidden_state.backward(gradient)

    return step


def hificl_step(bench: Bench, **options: Any) -> tuple[Trained, Adapter]:
    """Return HiFICL's step, and the adapter to be attached around it."""
    adapter = adapters.create("hificl", bench.model, **options)
    return Trained(bench, list(adapter.parameters())), adapter


def packed_steps(bench: Bench, count: int) -> tuple[Step, Step]:
    """Return the steps of `count` HiFICL trials in one forward and backward pass, and one after another.

    Each trial has a batch of its own, its own clip and its own optimiser.
    """
    made = [hificl_step(bench) for _ in range(count)]
    ids = [bench.ids() for _ in made]
    joined, batch = torch.cat(ids), len(ids[0])
    rows = [number for number in range(count) for _ in range(batch)]

    def together() -> None:
        with adapters.attach(bench.model, [adapter for _, adapter in made], rows):
            truths = made[0][0].truths(bench.hidden(bench.inputs(joined)), joined)
            truths.view(count, batch).mean(1).sum().backward()
        for step, _ in made:
            step.update()

    def alone() -> None:
        for (step, adapter), rows_of_trial in zip(made, ids, strict=True):
            with adapters.attach(bench.model, adapter):
                step(rows_of_trial)

    return together, alone


def mimic_step(bench: Bench, **options: Any) -> tuple[Aligned, Adapter]:
    """Return the step of MimIC's student, and the adapter to be attached around it."""
    adapter = adapters.create("mimic", bench.model, **options)
    return Aligned(bench, list(adapter.parameters())), adapter


def lora_step(bench: Bench, **options: Any) -> tuple[Trained, Adapter]:
    """Return LoRA's step, and the adapter to be attached around it; it starts from pixels."""
    adapter = adapters.create("lora", bench.model, **options)
    return Trained(bench, list(adapter.parameters())), adapter
