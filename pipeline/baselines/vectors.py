"""Task, function, in-context and multimodal task vectors: read off demonstrations, put into the zero-shot run.

Shape letters: L layers, H heads, d head size, D hidden size, V vocabulary.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from pipeline.backbones.decoder import decoder_of, output_projection
from pipeline.backbones.states import modules_at, recorded
from pipeline.backbones.weights import dequantized
from pipeline.baselines import Baseline, BaselineOptions, Setting, baselines
from pipeline.baselines.demonstrations import draw_from
from pipeline.core.errors import InputError
from pipeline.data.sample import Sample
from pipeline.prompts.prompt import Encoded, draw_demos

Shots = tuple[Sample, list[Sample]]  # a query and its demonstrations
Edit = Callable[[Tensor], Tensor]  # [B, D] -> [B, D]
_TOKENS = 8192  # tokens in a batch of copies of one prompt; an 8B backbone's activations of them fit beside it


class VectorOptions(BaselineOptions):
    """Where the vector comes from and where it goes."""

    answers_with_demonstrations: ClassVar[bool] = False
    num_shots: int = Field(8, ge=1)  # demonstrations in a prompt that states are read from
    num_prompts: int = Field(1, ge=1)  # prompts that are averaged over; at most the pool's samples
    layer: int | None = Field(None, ge=0)  # counted from 0; None: the best on the selection split

    def selects(self) -> bool:
        """The layer, unless it is given."""
        return self.layer is None


class PromptMethod(Baseline):
    """A method that looks at prompts with demonstrations, all of them drawn from the pool by the seed."""

    options: Any

    def fit(self, setting: Setting) -> None:
        """Keep what may be looked at."""
        super().fit(setting)
        self.spec = decoder_of(setting.host.loaded.model)
        self.outputs: list[Any] = [output_projection(attention) for attention in self.spec.attentions]

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
        return _wide(model.get_output_embeddings()(hidden[:, -1]))

    def answered(self, shots: Shots) -> tuple[Encoded, int]:
        """Return a prompt with its right answer behind it, and the answer's first token."""
        query, demos = shots
        (closed,) = self.setting.host.prompts(self.setting.manifest, [query], [demos], answer=True)
        start, _ = closed.answer_span or (0, 0)
        return closed, closed.input_ids[start]

    def mean_outputs(self) -> Tensor:
        """Return every head's mean output before W_O at the last token of `num_prompts` prompts, [L, H, d]."""
        shots = self.shots(self.options.num_prompts, self.name)
        total: Tensor | float = 0.0
        for prompt in shots:
            with last_states(self.outputs, inputs=True) as seen:
                self.run([prompt])
            total = total + torch.cat(seen)
        return (torch.as_tensor(total) / len(shots)).unflatten(1, (self.spec.num_heads, self.spec.head_dim))

    def must_select(self, what: str, way_out: str) -> Sequence[Sample]:
        """Return the selection split.

        Raises:
            InputError: it is empty.
        """
        if not self.setting.selection:
            problem = f"there is no selection sample to choose {what} on"
            raise InputError(problem, where="num_selection_samples", way_out=way_out)
        return self.setting.selection


class VectorMethod(PromptMethod):
    """A method that edits the hidden state of the last prompt token after one layer of the zero-shot run."""

    def fit(self, setting: Setting) -> None:
        """Read the vectors off the frozen model, then choose the layer with the best score; the first of equals.

        Raises:
            InputError: the layer asked for does not exist, or there is nothing to choose it on.
        """
        super().fit(setting)
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

    def _best_layer(self) -> int:
        selection, scores = self.must_select("the layer", "Draw some, or give the layer"), []
        for layer, module in enumerate(self.spec.layers):
            with edited_prefill(module, self.edit(layer)):
                scores.append(self.setting.score(selection))
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
        seen.append(_wide(value[:, -1]))

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
        spec, means = self.spec, self.mean_outputs()
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

    def _effects(self, means: Tensor) -> Tensor:
        """Return every head's average indirect effect, [L, H]."""
        shots = self.shots(self.options.num_effect_prompts, "function-vector effects")
        total = torch.zeros(means.shape[:2])
        for number, prompt in enumerate(shots):
            total += self._effect(self._shuffled(prompt, number), means)
        return total / len(shots)

    def _effect(self, shots: Shots, means: Tensor) -> Tensor:
        closed, answer = self.answered(shots)
        ask = self._repeated(shots)
        plain = ask(1).softmax(-1)[0, answer]
        at_once = max(1, min(self.spec.num_heads, _TOKENS // len(closed)))
        effects = torch.zeros(means.shape[:2])
        for layer, output in enumerate(self.outputs):

            def patched(heads: Sequence[int], layer: int = layer, output: nn.Module = output) -> list[Tensor]:
                with _replaced_heads(output, torch.tensor(heads), means[layer, heads]):
                    return list(ask(len(heads)).softmax(-1)[:, answer].cpu())

            for heads in torch.arange(self.spec.num_heads).split(at_once):
                answers = self.setting.host.loaded.passes.run(
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


def _wide(x: Tensor) -> Tensor:
    """Return `x` in fp32, or as it is where it is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _at(x: Tensor, places: list[int]) -> Tensor:
    """Return the first row's states at some places, [len(places), D]."""
    return _wide(x[0, places])


class MultimodalTaskVectorOptions(BaselineOptions):
    """How many prompts are averaged over, and how the heads are looked for."""

    answers_with_demonstrations: ClassVar[bool] = False
    num_shots: int = Field(4, ge=1)
    num_prompts: int = Field(100, ge=1)  # for the heads' mean outputs
    num_steps: int = Field(100, ge=1)  # of REINFORCE, each on one sample of the selection split
    num_draws: int = Field(32, ge=2)  # of heads, at each step
    step_size: float = Field(0.1, gt=0)  # of Adam, on the logits of the heads' probabilities

    def selects(self) -> bool:
        """The heads."""
        return True


@baselines.register
class MultimodalTaskVector(PromptMethod):
    """Chosen heads give their mean output over many prompts with demonstrations (MTV, Huang et al. 2024).

    a_lh[last] <- mean of a_lh[last] over `num_prompts` prompts of `num_shots` demonstrations, before W_O, for the heads
    of a set S. S is looked for by REINFORCE (arXiv 2406.15334): every head is in it with probability
    p = sigmoid(theta), theta = -1 at the start; of `num_draws` sets a step, with l(S) the negative log-probability of
    the first token of a selection sample's answer, theta follows the mean of (l(S) - mean l) (S - p) downwards, by
    Adam. Taken are the heads with p > 1/2, or the likeliest where there is none.
    """

    name = "mtv"
    Options: ClassVar[type[BaselineOptions]] = MultimodalTaskVectorOptions

    @torch.no_grad()
    def fit(self, setting: Setting) -> None:
        """Average the heads' outputs, then look for the heads."""
        super().fit(setting)
        options = self.options
        samples: list[Shots] = [(sample, []) for sample in self.must_select("the heads", "Draw some")]
        self.means = self.mean_outputs()
        chances = reinforce(
            lambda step, sets: self.losses(samples[step % len(samples)], sets), tuple(self.means.shape[:2]),
            options.num_steps, options.num_draws, options.step_size, torch.Generator().manual_seed(setting.seed),
        )  # fmt: skip
        likely = chances > 0.5
        self.heads = likely if likely.any() else chances == chances.max()
        self.found["heads"] = [
            {"layer": layer, "head": head, "probability": chances[layer, head].item()}
            for layer, head in self.heads.nonzero().tolist()
        ]

    def losses(self, shots: Shots, sets: Tensor) -> Tensor:
        """Return the negative log-probability of the answer's first token under each set of heads [n, L, H], [n]."""
        closed, answer = self.answered(shots)

        def each(chosen: Sequence[Tensor]) -> list[Tensor]:
            with given_heads(self.outputs, self.means, torch.stack(list(chosen))):
                return list(-self.run([shots] * len(chosen)).log_softmax(-1)[:, answer].cpu())

        passes = self.setting.host.loaded.passes
        return torch.stack(passes.run("multimodal task vectors", list(sets), each, width=lambda _: len(closed)))

    def edited(self) -> AbstractContextManager[None]:
        """Return a context in which every prompt's last token has the heads' means."""
        return given_heads(self.outputs, self.means, self.heads[None])


@contextmanager
def given_heads(outputs: Sequence[nn.Module], means: Tensor, chosen: Tensor) -> Iterator[None]:
    """Give heads their mean output at the last position of a prompt; a pass over one position is a decoding step.

    Args:
        outputs: each layer's W_O.
        means: [L, H, d].
        chosen: which heads, [B, L, H], or [1, L, H] for all rows.
    """

    def hook(layer: int, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        x = args[0]
        if x.shape[1] == 1:
            return None
        last, flags = x[:, -1].unflatten(-1, means.shape[1:]), chosen[:, layer, :, None].to(x.device)
        edited = torch.where(flags, means[layer].to(x), last).flatten(1)
        return (torch.cat([x[:, :-1], edited[:, None]], 1), *args[1:])

    handles = [output.register_forward_pre_hook(partial(hook, layer)) for layer, output in enumerate(outputs)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def reinforce(
    losses: Callable[[int, Tensor], Tensor], shape: tuple[int, ...], steps: int, draws: int, step_size: float,
    generator: torch.Generator,
) -> Tensor:  # fmt: skip
    """Return the probabilities [*shape] under which drawn sets have a low loss, by REINFORCE with the mean as baseline.

    Args:
        losses: of a step's number and its sets [draws, *shape], of truth values: [draws].
        shape: of a set.
        steps: how many.
        draws: sets a step.
        step_size: Adam's.
        generator: of the draws.
    """
    theta = -torch.ones(shape)
    optimiser = torch.optim.Adam([theta], lr=step_size)
    for step in range(steps):
        chances = theta.sigmoid()
        sets = torch.rand((draws, *shape), generator=generator) < chances
        loss = losses(step, sets)
        theta.grad = torch.tensordot((loss - loss.mean()).to(theta) / draws, sets.to(chances) - chances, 1)
        optimiser.step()
    return theta.sigmoid()


class InContextVectorOptions(BaselineOptions):
    """How many demonstrations the direction comes from, how far states are turned, and which."""

    answers_with_demonstrations: ClassVar[bool] = False
    num_shots: int = Field(8, ge=1)
    strength: float = Field(0.1, ge=0)
    point: Literal["mlp", "residual"] = "mlp"


@baselines.register
class InContextVector(Baseline):
    """m_l <- |m_l| n(m_l / |m_l| + lambda v_l / |v_l|) in every layer, for every token (ICV, Liu et al. 2024).

    n(x) = x / |x|, m_l what the FFN gives, as in the published code, or with `point: residual` the stream behind it.
    v = (v_1 ... v_L) is the direction of R^(L D) with |v| = 1 that maximises sum_i (v . d_i)^2 over `num_shots`
    demonstrations, sum_i v . d_i >= 0; d_i is what changes in all layers' residual streams from the last token of
    question i to the last of its answer, which is read behind it. lambda is `strength`. arXiv 2311.06668.
    """

    name = "icv"
    Options: ClassVar[type[BaselineOptions]] = InContextVectorOptions
    options: InContextVectorOptions

    @torch.no_grad()
    def fit(self, setting: Setting) -> None:
        """Take the direction off the demonstrations, each of which stands alone."""
        super().fit(setting)
        spec = decoder_of(setting.host.loaded.model)
        self.modules = modules_at(spec, self.options.point)
        by_id = {sample.sample_id: sample for sample in setting.pool}
        ids = draw_demos(list(by_id), "", self.options.num_shots, setting.seed, draw=self.name)
        host, changes = setting.host, []
        for prompt in host.prompts(setting.manifest, [by_id[i] for i in ids], [[]] * len(ids), answer=True):
            start, end = prompt.answer_span or (1, len(prompt))
            inputs = host.batch([prompt], setting.manifest).model_inputs(host.loaded)
            with recorded(spec, "residual", partial(_at, places=[start - 1, end - 1])) as seen:
                host.loaded.model.model(**inputs, use_cache=False)
            changes.append(torch.stack([after - before for before, after in seen]))
        self.directions = F.normalize(principal(torch.stack(changes)), dim=-1)

    @contextmanager
    def edited(self) -> Iterator[None]:
        """Turn every layer's state."""

        def hook(direction: Tensor, module: nn.Module, args: Any, output: Any) -> Any:
            x = output[0] if isinstance(output, tuple) else output
            h, towards = _wide(x), direction.to(x.device)
            size = h.norm(dim=-1, keepdim=True)
            turned = (F.normalize(F.normalize(h, dim=-1) + self.options.strength * towards, dim=-1) * size).to(x.dtype)
            return (turned, *output[1:]) if isinstance(output, tuple) else turned

        hooked = zip(self.modules, self.directions, strict=True)
        handles = [module.register_forward_hook(partial(hook, direction), prepend=True) for module, direction in hooked]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def principal(changes: Tensor) -> Tensor:
    """Return the unit direction [...] along which changes [k, ...] are largest in squares, on their mean's side."""
    rows = changes.flatten(1).double().cpu()
    direction = torch.linalg.svd(rows, full_matrices=False).Vh[0]
    direction = direction * (1 if rows.mean(0) @ direction >= 0 else -1)
    return direction.to(changes).view(changes.shape[1:])
