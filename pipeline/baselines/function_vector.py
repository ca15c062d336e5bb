"""Function vector: the mean output of the attention heads that carry a task (Todd et al. 2024).

Shape letters: L layers, H heads, d head size, D hidden size, V vocabulary.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from pipeline.baselines import BaselineOptions, baselines
from pipeline.baselines.vectors import Edit, Shots, VectorMethod, VectorOptions, last_states

_TOKENS = 8192  # tokens in a batch of copies of one prompt; an 8B backbone's activations of them fit beside it


class FunctionVectorOptions(VectorOptions):
    """How many prompts are averaged over, and how many heads are taken."""

    num_prompts: int = Field(100, ge=1)  # for the heads' mean outputs
    num_effect_prompts: int = Field(25, ge=1)  # with shuffled answers, for the heads' effects
    num_heads: int = Field(10, ge=1)


@baselines.register
class FunctionVector(VectorMethod):
    """h_l[last] <- h_l[last] + v, v = sum of W_O a over the `num_heads` heads with the largest effect (Todd et al.).

    a of a head is its mean output at the last token of k-shot prompts. Its effect is the mean rise of the right
    answer's first token's probability when a replaces the head's output at the last token of a prompt whose
    demonstrations have their answers shuffled. Costs L H `num_effect_prompts` prompts.
    """

    name = "function-vector"
    Options: ClassVar[type[BaselineOptions]] = FunctionVectorOptions

    def read(self) -> None:
        """Compute the heads' means and effects, and the vector [D]."""
        spec = self.spec
        self.outputs: list[Any] = [attention.o_proj for attention in spec.attentions]  # type: ignore[union-attr]
        means = self._mean_outputs()
        effects = self._effects(means)
        order = effects.flatten().sort(descending=True, stable=True).indices[: self.options.num_heads].tolist()
        heads = [divmod(i, spec.num_heads) for i in order]
        self.vector = torch.zeros(spec.hidden_size, device=means.device)
        for layer, head in heads:
            alone = torch.zeros_like(means[layer])
            alone[head] = means[layer, head]
            self.vector += F.linear(alone.flatten(), self.outputs[layer].weight.float())
        self.found["heads"] = [{"layer": i, "head": j, "effect": effects[i, j].item()} for i, j in heads]

    def edit(self, layer: int) -> Edit:
        """Add the vector."""
        return lambda h: h.float() + self.vector

    def _mean_outputs(self) -> Tensor:
        """Return every head's mean output before W_O, [L, H, d]."""
        shots = self.shots(self.options.num_prompts, "function-vector")
        total: Tensor | float = 0.0
        for prompt in shots:
            with last_states(self.outputs, inputs=True) as seen:
                self.run([prompt])
            total = total + torch.cat(seen)
        return (torch.as_tensor(total) / len(shots)).unflatten(1, (self.spec.num_heads, self.spec.head_dim))

    def _effects(self, means: Tensor) -> Tensor:
        """Return every head's average indirect effect, [L, H]."""
        shots = self.shots(self.options.num_effect_prompts, "function-vector effects")
        total = torch.zeros(means.shape[:2])
        for number, prompt in enumerate(shots):
            total += self._effect(self._shuffled(prompt, number), means)
        return total / len(shots)

    def _effect(self, shots: Shots, means: Tensor) -> Tensor:
        setting = self.setting
        query, demos = shots
        (closed,) = setting.host.prompts(setting.manifest, [query], [demos], answer=True)
        start, _ = closed.answer_span or (0, 0)
        answer = closed.input_ids[start]
        plain = self.run([shots]).softmax(-1)[0, answer]
        at_once = max(1, min(self.spec.num_heads, _TOKENS // len(closed)))
        effects = torch.zeros(means.shape[:2])
        for layer, output in enumerate(self.outputs):
            for heads in torch.arange(self.spec.num_heads).split(at_once):
                with _replaced_heads(output, heads, means[layer, heads]):
                    patched = self.run([shots] * len(heads)).softmax(-1)[:, answer]
                effects[layer, heads] = (patched - plain).cpu()
        return effects

    def _shuffled(self, shots: Shots, number: int) -> Shots:
        """Give the demonstrations each other's answers."""
        query, demos = shots
        answers = [demo.shown for demo in demos]
        random.Random(f"{self.setting.seed}/shuffle/{number}").shuffle(answers)
        return query, [replace(demo, demonstration=answer) for demo, answer in zip(demos, answers, strict=True)]


@contextmanager
def _replaced_heads(output: nn.Module, heads: Tensor, values: Tensor) -> Iterator[None]:
    """Give row b of a batch `values[b]` [d] as the output of head `heads[b]` at the last position."""

    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = args[0].clone()
        rows = torch.arange(len(heads), device=x.device)
        last = x[:, -1].unflatten(-1, (-1, values.shape[-1]))  # a view: [B, H, d]
        last[rows, heads.to(x.device)] = values.to(x.dtype)
        return (x, *args[1:])

    handle = output.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()
