"""Task vectors and function vectors: read from prompts with demonstrations, put into the zero-shot run after a layer.

Shape letters: L layers, H heads, d head size, D hidden size, V vocabulary.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from pipeline.backbones.decoder import decoder_of, output_projection
from pipeline.backbones.weights import dequantized
from pipeline.baselines import Baseline, BaselineOptions, Setting, baselines
from pipeline.baselines.demonstrations import draw_from
from pipeline.core.errors import InputError
from pipeline.data.sample import Sample
from pipeline.prompts.prompt import draw_demos

Shots = tuple[Sample, list[Sample]]  # a query and its demonstrations
Edit = Callable[[Tensor], Tensor]  # [B, D] -> [B, D]
_TOKENS = 8192  # tokens in a batch of copies of one prompt; an 8B backbone's activations of them fit beside it


class VectorOptions(BaselineOptions):
    """Where the vector comes from and where it goes."""

    num_shots: int = Field(8, ge=1)  # demonstrations in a prompt that states are read from
    num_prompts: int = Field(1, ge=1)  # prompts that are averaged over; at most the pool's samples
    layer: int | None = Field(None, ge=0)  # counted from 0; None: the best on the selection split

    def selects(self) -> bool:
        """The layer, unless it is given."""
        return self.layer is None


class VectorMethod(Baseline):
    """A method that edits the hidden state of the last prompt token after one layer of the zero-shot run."""

    options: Any

    def fit(self, setting: Setting) -> None:
        """Read the vectors off the frozen model, then choose the layer with the best score; the first of equals.

        Raises:
            InputError: the layer asked for does not exist, or there is nothing to choose it on.
        """
        super().fit(setting)
        self.spec = decoder_of(setting.host.loaded.model)
        given = self.options.layer
        if given is not None and given >= self.spec.num_layers:
            raise InputError(
                f"layer {given} is asked for, the decoder has {self.spec.num_layers}",
                where="layer",
                way_out=f"Give 0 to {self.spec.num_layers - 1}, or null to choose on the selection set",
            )
        with torch.no_grad():
            self.read()
        self.layer = self._best_layer() if given is None else given
        self.found["layer"] = self.layer

    def read(self) -> None:
        """Compute the vectors from prompts of the pool."""
        raise NotImplementedError

    def edit(self, layer: int) -> Edit:
        """Return what is done with the last prompt token's state after `layer`."""
        raise NotImplementedError

    def edited(self) -> AbstractContextManager[None]:
        """Return a context in which every prompt is run with the edit."""
        return edited_prefill(self.spec.layers[self.layer], self.edit(self.layer))

    def shots(self, number: int, use: str) -> list[Shots]:
        """Return `number` queries of the pool with demonstrations, fixed by the seed.

        Args:
            number: how many; at most as many as the pool has samples.
            use: tells apart draws for different purposes.
        """
        pool, seed = self.setting.pool, self.setting.seed
        by_id = {sample.sample_id: sample for sample in pool}
        ids = draw_demos(list(by_id), "", min(number, len(by_id)), seed, draw=use)
        return [(by_id[i], draw_from(pool, by_id[i], self.options.num_shots, seed, draw=use)) for i in ids]

    def run(self, shots: Sequence[Shots]) -> Tensor:
        """Return the next token's logits [B, V] behind open prompts of one length, in fp32."""
        setting = self.setting
        queries, demos = zip(*shots, strict=True)
        encoded = setting.host.prompts(setting.manifest, queries, demos, answer=False)
        model = setting.host.loaded.model
        inputs = setting.host.batch(encoded, setting.manifest).model_inputs(setting.host.loaded)
        hidden = model.model(**inputs, use_cache=False).last_hidden_state
        return model.get_output_embeddings()(hidden[:, -1]).float()

    def _best_layer(self) -> int:
        setting = self.setting
        if not setting.selection:
            raise InputError(
                "there is no selection sample to choose the layer on",
                where="num_selection_samples",
                way_out="Draw some, or give the layer",
            )
        scores = []
        for layer, module in enumerate(self.spec.layers):
            with edited_prefill(module, self.edit(layer)):
                scores.append(setting.score(setting.selection))
        self.found["selection_scores"] = scores
        return max(range(len(scores)), key=scores.__getitem__)


@contextmanager
def edited_prefill(layer: nn.Module, edit: Edit) -> Iterator[None]:
    """Edit the last position's hidden state after `layer`, in the pass over the prompt alone.

    For prompts that end at the batch's last position: one prompt, or rows padded on the left. A pass over a single
    position is a step of cached decoding; it sees the edit through the cache of the layers above.
    """

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        h = output[0] if isinstance(output, tuple) else output
        if h.shape[1] == 1:
            return output
        h = torch.cat([h[:, :-1], edit(h[:, -1]).to(h.dtype).unsqueeze(1)], dim=1)
        return (h, *output[1:]) if isinstance(output, tuple) else h

    handle = layer.register_forward_hook(hook, prepend=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def last_states(modules: Sequence[nn.Module], *, inputs: bool = False) -> Iterator[list[Tensor]]:
    """Collect the last position's output (or first input) [B, D] of each module in fp32, in the order of the calls."""
    seen: list[Tensor] = []

    def keep(value: Any) -> None:
        value = value[0] if isinstance(value, tuple) else value
        seen.append(value[:, -1].float())

    if inputs:
        handles = [module.register_forward_pre_hook(lambda m, args: keep(args)) for module in modules]
    else:
        handles = [module.register_forward_hook(lambda m, args, output: keep(output)) for module in modules]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


class TaskVectorOptions(VectorOptions):
    """One prompt, as in the paper, unless `num_prompts` asks for a mean over several."""


@baselines.register
class TaskVector(VectorMethod):
    """h_l[last] <- theta_l, theta_l = h_l[last] of [k demonstrations ; dummy query] (Hendel et al. 2023).

    The dummy query is a sample of the pool, so that no query sees its own answer. With `num_prompts` above 1 theta_l
    is the mean over as many prompts.
    """

    name = "task-vector"
    Options: ClassVar[type[BaselineOptions]] = TaskVectorOptions

    def read(self) -> None:
        """Take the states after every layer, [L, D]."""
        states = []
        for shots in self.shots(self.options.num_prompts, "task-vector"):
            with last_states(self.spec.layers) as seen:
                self.run([shots])
            states.append(torch.cat(seen))
        self.vectors = torch.stack(states).mean(0)

    def edit(self, layer: int) -> Edit:
        """Put the vector in the state's place."""
        return self.vectors[layer].expand_as


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
        self.outputs: list[Any] = [output_projection(attention) for attention in spec.attentions]
        means = self._mean_outputs()
        effects = self._effects(means)
        order = effects.flatten().sort(descending=True, stable=True).indices[: self.options.num_heads].tolist()
        heads = [divmod(i, spec.num_heads) for i in order]
        self.vector = torch.zeros(spec.hidden_size, device=means.device)
        for layer, head in heads:
            alone = torch.zeros_like(means[layer])
            alone[head] = means[layer, head]
            self.vector += F.linear(alone.flatten(), dequantized(self.outputs[layer]).float())
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
        ask = self._repeated(shots)
        plain = ask(1).softmax(-1)[0, answer]
        at_once = max(1, min(self.spec.num_heads, _TOKENS // len(closed)))
        effects = torch.zeros(means.shape[:2])
        for layer, output in enumerate(self.outputs):

            def patched(heads: Sequence[int], layer: int = layer, output: nn.Module = output) -> list[Tensor]:
                with _replaced_heads(output, torch.tensor(heads), means[layer, heads]):
                    return list(ask(len(heads)).softmax(-1)[:, answer].cpu())

            for heads in torch.arange(self.spec.num_heads).split(at_once):
                answers = setting.host.loaded.passes.run(
                    "function vectors", heads.tolist(), patched, width=lambda _: len(closed)
                )
                effects[layer, heads] = torch.stack(answers) - plain.cpu()
        return effects

    def _repeated(self, shots: Shots) -> Callable[[int], Tensor]:
        """Return what gives the next token's logits [n, V] behind n copies of an open prompt, in fp32.

        Where it is text alone, keys and values of all but its last token are computed once: what is done to heads at
        the last position changes none of them.
        """
        host, manifest, (query, demos) = self.setting.host, self.setting.manifest, shots
        loaded, model = host.loaded, host.loaded.model
        if query.images or not loaded.family.shares_prefix:
            return lambda copies: self.run([shots] * copies)
        (whole,) = host.prompts(manifest, [query], [demos], answer=False)
        length = len(whole) - 1
        inputs = host.batch([replace(whole, input_ids=whole.input_ids[:length])], manifest).model_inputs(loaded)
        before = model.model(**inputs, use_cache=True).past_key_values
        caches: dict[int, Any] = {}

        def ask(copies: int) -> Tensor:
            if copies not in caches:
                caches[copies] = copy.deepcopy(before)
                caches[copies].batch_repeat_interleave(copies)
            last = torch.tensor([[whole.input_ids[length]]], device=model.device).expand(copies, 1)
            given = {"position_ids": torch.full_like(last, length), "past_key_values": caches[copies]}
            hidden = model.model(input_ids=last, **given, use_cache=True).last_hidden_state
            caches[copies].crop(-1)
            return model.get_output_embeddings()(hidden[:, -1]).float()

        return ask

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
