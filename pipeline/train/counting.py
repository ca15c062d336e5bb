"""What a card must hold, counted on meta tensors: every storage of a pass while it lives, at full width.

A decoder's layers are alike, so a pass is counted at two small depths and drawn out to the real one.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any
from unittest.mock import patch

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline import adapters, backbones, methods
from pipeline.backbones.decoder import checkpointed_layers, decoder_of
from pipeline.backbones.load import DTYPES
from pipeline.backbones.passes import FILL as OF_WHAT_IS_FREE
from pipeline.backbones.passes import bytes_of_row
from pipeline.backbones.states import recorded
from pipeline.backbones.weights import quantizable, stored_bytes, weight_bytes
from pipeline.config.trial import MOST_PACKED, TrialConfig
from pipeline.core.errors import InputError
from pipeline.cost.flops import Costs
from pipeline.train import loss
from pipeline.train.cost import FILL

GIB = 1 << 30
CONTEXT = GIB // 2  # of CUDA itself: kernels, cuBLAS' workspaces
CARDS = (24, 48, 80)  # GiB
ANSWER = 4  # tokens with logits
NEW, MOST_ROWS = 10, 64  # tokens of an answer; prompts answered at once


class _Living(TorchDispatchMode):
    """Adds up the bytes of the storages that are alive; `peak` is the most there have been."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known = {p.untyped_storage()._cdata for p in model.parameters()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for made in pytree.tree_leaves(out):
            if isinstance(made, Tensor) and made.is_meta:
                self._note(made.untyped_storage())
        return out

    def _note(self, storage: torch.UntypedStorage) -> None:
        name, size = storage._cdata, storage.nbytes()
        if name in self._known:
            return
        self._known.add(name)
        self.now += size
        self.peak = max(self.peak, self.now)

        def gone() -> None:
            self._known.discard(name)
            self.now -= size

        weakref.finalize(storage, gone)


@dataclass(frozen=True)
class StepMemory:
    """Bytes beside the weights, of one trial's micro-batch.

    Attributes:
        method: how it trains.
        rows: of the micro-batch.
        step: forward and backward pass.
        checkpointed: the same with `train.gradient_checkpointing`.
        teacher: the frozen decoder behind the demonstrations, or on those that a method starts from; 0 without either.
    """

    method: str
    rows: int
    step: int
    checkpointed: int
    teacher: int

    def trials(self, room: float, *, again: bool = False) -> int:
        """Return how many such trials train together in `room` bytes beside the weights; 0: not one does."""
        if self.teacher > room:
            return 0
        return max(0, min(MOST_PACKED["cuda"], int(room // (self.checkpointed if again else self.step))))


@dataclass(frozen=True)
class BackboneMemory:
    """What one backbone's trials take.

    Attributes:
        backbone: its name.
        precision: of its weights.
        quantize: how its decoder's linear weights are stored.
        weights: bytes.
        steps: of each method that trains.
        answers: by number of demonstrations in front of a question: bytes of one prompt that is answered.
    """

    backbone: str
    precision: str
    quantize: str
    weights: int
    steps: list[StepMemory]
    answers: dict[int, int]

    @property
    def stored(self) -> str:
        """How its weights are stored, in words."""
        few = "" if self.quantize == "none" else f", its decoder in {self.quantize}"
        return f"in {self.precision}{few}"

    def room(self, card: int) -> float:
        """Return the bytes that training may take beside the weights on a card of so many GiB."""
        return FILL * card * GIB - CONTEXT - self.weights

    def rows(self, card: int, shots: int) -> int:
        """Return how many prompts are answered at once on a card of so many GiB; 0: not one is."""
        free = OF_WHAT_IS_FREE * (card * GIB - CONTEXT - self.weights)
        return max(0, min(MOST_ROWS, int(free // self.answers[shots])))


def memory_of(trials: Iterable[TrialConfig]) -> tuple[list[BackboneMemory], dict[str, str]]:
    """Return what trials take, by what is resident, and the backbones that cannot be counted, with the reason."""
    groups: dict[tuple[str, str, str], list[TrialConfig]] = {}
    for trial in trials:
        groups.setdefault((trial.backbone, trial.precision, trial.quantize), []).append(trial)
    counted, left_out = [], {}
    for (name, precision, kind), of_group in groups.items():
        try:
            counter = MemoryOf(name, precision, kind)
        except InputError as error:
            left_out[name] = error.what
            continue
        trained = {
            (trial.method, trial.micro_batch_size, trial.num_shots): trial for trial in of_group if trial.trained
        }
        shots = {0, *(methods.options(trial).shots for trial in of_group)}
        answers = {k: counter.answer(k) for k in sorted(shots)}
        steps = [counter.step(trial) for trial in trained.values()]
        counted.append(BackboneMemory(name, precision, kind, counter.weights, steps, answers))
    return counted, left_out


class MemoryOf:
    """What passes of one backbone take, in one precision.

    Args:
        name: the backbone.
        precision: of its weights.
        quantize: how its decoder's linear weights are stored.

    Raises:
        InputError: an unknown backbone, or one whose pictures have no formula.
    """

    def __init__(self, name: str, precision: str, quantize: str = "none") -> None:
        self.name, self.dtype = name, DTYPES[precision]
        loaded = backbones.load(name, variant="meta")
        self.model = loaded.model.to(self.dtype)
        self.weights = weight_bytes(self.model)
        self.passing = 0  # bytes that a product takes for its weight as numbers, one weight at a time
        if quantize != "none":
            linears = [linear.weight for linear in quantizable(self.model).values()]
            self.weights += sum(round(stored_bytes(weight.shape, quantize)) - weight.nbytes for weight in linears)
            self.passing = max(weight.nbytes for weight in linears)
        self.layers = decoder_of(self.model).num_layers
        costs = Costs(loaded.backbone, self.model)
        self.turn, self.patches, self.vision = costs.turn, costs.image.patches, loaded.backbone.modules.vision
        every = max(2, getattr(self.model.config, "cross_layer_interval", 2))  # a stretch of layers that repeats
        self.depths = (every, 2 * every)

    def step(self, config: TrialConfig) -> StepMemory:
        """Return what one trial's micro-batch takes."""
        rows, behind = config.micro_batch_size, self.turn * (config.num_shots + 1)
        plain = self._drawn_out(lambda model: self._step(model, config, again=False))
        again = self._drawn_out(lambda model: self._step(model, config, again=True))
        facts = methods.facts(config)
        teacher = self._drawn_out(lambda model: forward_peak(model, rows, behind)) if facts.teacher else 0
        if facts.starts:
            teacher = max(teacher, self.prefill(1, self.turn * config.num_shots))
        if facts.trains_vision:
            held = vision_held(_shallow(self.name, self.depths[0]).to(self.dtype), config, self.vision, self.patches)
            plain, again = plain + held, again + held
        return StepMemory(config.method, rows, plain, again, teacher)

    def answer(self, shots: int) -> int:
        """Return about what one prompt takes that is answered behind so many demonstrations."""
        return bytes_of_row(self.model, self.turn * (shots + 1), new=NEW)

    def prefill(self, rows: int, tokens: int) -> int:
        """Return what prompts' pass takes whose keys and values are kept, with a mask for padding."""
        return self._drawn_out(lambda model: forward_peak(model, rows, tokens, cached=True))

    def _drawn_out(self, count: Callable[[Any], int]) -> int:
        small, large = (count(_shallow(self.name, depth).to(self.dtype)) for depth in self.depths)
        return (
            self.passing + small + (large - small) * (self.layers - self.depths[0]) // (self.depths[1] - self.depths[0])
        )

    def _step(self, model: Any, config: TrialConfig, *, again: bool) -> int:
        """Return the peak of a forward and a backward pass, as `train.loop` runs them."""
        spec = decoder_of(model)
        aligned = loss.ALIGNED_BYTES * spec.num_layers // self.layers  # as large a share of the layers
        with patch.object(loss, "ALIGNED_BYTES", aligned):
            return step_peak(model, config, self.turn, again=again)


@cache
def _shallow(name: str, depth: int) -> Any:
    """Return a backbone's model on the meta device with its decoder's first layers alone."""
    backbone = backbones.get(name)
    settings = backbone.config_for("meta")
    text: Any = settings.get("text_config", settings)
    text["num_hidden_layers"] = depth
    with torch.device("meta"):
        model = backbone.family.model_class(backbone.family.build_config(settings))
    return model.requires_grad_(False).eval()


def _flash(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, **given: Any) -> Tensor:
    """Attend without a mask by the operator of a card; on meta tensors torch would write all scores out."""
    if attn_mask is not None or given.get("dropout_p"):
        return _ATTENTION(q, k, v, attn_mask=attn_mask, **given)
    flash, causal = torch.ops.aten._scaled_dot_product_flash_attention, given.get("is_causal", False)
    return flash(q, k, v, 0.0, causal, scale=given.get("scale"))[0]


_ATTENTION = torch.nn.functional.scaled_dot_product_attention


@contextmanager
def _as_on_a_card() -> Iterator[None]:
    """Let meta tensors go the way of a card's; transformers may not look at positions, which have no numbers."""
    with (
        patch("transformers.masking_utils.find_packed_sequence_indices", lambda position_ids: None),
        patch("torch.nn.functional.scaled_dot_product_attention", _flash),
    ):
        yield


def step_peak(model: Any, config: TrialConfig, tokens: int, *, again: bool) -> int:
    """Return the bytes of a micro-batch's forward and backward pass with rows of so many tokens, on the meta device.

    Args:
        model: the backbone.
        config: the trial.
        tokens: of a row.
        again: with `train.gradient_checkpointing`.
    """
    adapter = adapters.create(config.method, model, **config.options)
    adapter.expect(tokens * config.num_shots)
    spec, facts, rows = decoder_of(model), adapter.facts, config.micro_batch_size
    like: dict[str, Any] = {"device": "meta", "dtype": next(model.parameters()).dtype}
    hidden_taught, living = facts.teacher == "hidden", _Living(model)
    with living, _as_on_a_card(), adapters.attach(model, adapter.train()):
        x = torch.empty(rows, tokens, spec.hidden_size, **like)
        recording: AbstractContextManager[list[Tensor]]
        recording = recorded(spec, facts.state) if hidden_taught else nullcontext([])
        kept: AbstractContextManager[None] = checkpointed_layers(model) if again else nullcontext()
        with recording as states, kept:
            hidden = spec.decoder(inputs_embeds=x, use_cache=False).last_hidden_state
            logits = loss.wide(model.get_output_embeddings()(hidden[:, -ANSWER:].flatten(0, 1)))
            value = logits.logsumexp(-1).mean()
            if hidden_taught:
                taught = torch.empty(len(states), rows * tokens, spec.hidden_size, **like)
                value = value + loss.alignment([state.flatten(0, 1) for state in states], [taught]).sum()
            elif facts.teacher == "logits":
                owner = torch.empty(len(logits), device="meta", dtype=torch.long)
                value = value + loss.divergence(logits, torch.empty_like(logits), owner, rows).sum()
            value.backward()
    return living.peak


def vision_held(model: Any, config: TrialConfig, tower: str, patches: int) -> int:
    """Return the bytes that the vision tower's layers keep for their backward pass, where they are trained.

    Args:
        model: the backbone.
        config: the trial; an image a row.
        tower: the vision tower's name in the model.
        patches: of an image.
    """
    named = model.get_submodule(tower).named_modules()
    encoder: Any = next(module for name, module in named if name.rpartition(".")[2] == "encoder")
    adapter, living = adapters.create(config.method, model, **config.options).train(), _Living(model)
    like: dict[str, Any] = {"device": "meta", "dtype": next(model.parameters()).dtype}
    with adapters.attach(model, adapter), living, _as_on_a_card():
        out = encoder(torch.empty(config.micro_batch_size, patches, encoder.config.hidden_size, **like))
        held = living.now
    del out
    return held


@torch.no_grad()
def forward_peak(model: Any, rows: int, tokens: int, *, cached: bool = False) -> int:
    """Return the bytes of a forward pass without a gradient; `cached`: its keys and values are kept, pads are masked.

    An adapter is attached, with which attention takes a card's kernels.
    """
    spec = decoder_of(model)
    living = _Living(model)
    with living, _as_on_a_card(), adapters.attach(model, adapters.create("hificl", model)):
        x = torch.empty(rows, tokens, spec.hidden_size, device="meta", dtype=next(model.parameters()).dtype)
        mask = torch.empty(rows, 1, tokens, tokens, device="meta", dtype=torch.bool) if cached else None
        out = spec.decoder(inputs_embeds=x, attention_mask=mask, use_cache=cached)
    del out
    return living.peak
