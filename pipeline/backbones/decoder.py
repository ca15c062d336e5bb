"""The decoder inside any transformers model: its layers, attention modules and sizes, found without names of models."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest.mock import patch
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from pipeline.core.errors import InputError


@dataclass(frozen=True)
class DecoderSpec:
    """What an adapter needs to know of a decoder.

    Attributes:
        decoder: the module whose forward runs the layers.
        layers: the decoder layers, bottom first; a layer's output is the residual stream.
        attentions: the self-attention modules, bottom first, all of one shape; a layer that mixes tokens in another
            way (a convolution, linear attention) or looks at the images alone (cross-attention) has none.
        num_layers, num_heads, num_kv_heads, head_dim, hidden_size: sizes, read off the modules.
        text_config: the configuration that the attention modules read.
        model_type: `config.model_type` of the whole model.
    """

    decoder: nn.Module
    layers: list[nn.Module]
    attentions: list[nn.Module]
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    text_config: Any
    model_type: str

    @property
    def num_attentions(self) -> int:
        """Layers that attend: what an adapter of attention has parameters for."""
        return len(self.attentions)


def decoder_of(model: nn.Module) -> DecoderSpec:
    """Return the decoder of a transformers model, on any device, meta included.

    Heads and head size are read off the projections, because some configurations name neither `head_dim` nor
    `num_key_value_heads`, and class defaults are wrong for others: heads off the projection behind attention, since
    the one to queries may hold gates besides.

    Args:
        model: a transformers model with a decoder (multimodal or text alone).

    Raises:
        InputError: no decoder with self-attention of q, k, v, o projections is found, or one whose attentions differ
            in shape.
    """
    kind = type(model).__name__
    decoder, layers = _layers(model)
    if not layers:
        way_out = "Use a decoder or a vision-language model"
        raise InputError(f"{kind} has no decoder with a list of layers", way_out=way_out)
    attentions = [attention for layer in layers if (attention := self_attention(layer, kind)) is not None]
    if not attentions:
        raise InputError(f"no decoder layer of {kind} has a self-attention with q, k, v, o projections")
    shapes = {_shape(attention) for attention in attentions}
    if len(shapes) > 1:
        shown = " and ".join(f"{heads}/{kv_heads} heads of {size}" for heads, kv_heads, size in sorted(shapes))
        raise InputError(f"the decoder layers of {kind} attend in different shapes: {shown}")
    ((heads, kv_heads, head_dim),) = shapes
    first: Any = attentions[0]
    return DecoderSpec(
        decoder=decoder,
        layers=layers,
        attentions=attentions,
        num_layers=len(layers),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        hidden_size=int(output_projection(first).out_features),
        text_config=first.config,
        model_type=str(getattr(model.config, "model_type", kind)),  # type: ignore[union-attr]
    )


def _layers(model: nn.Module) -> tuple[Any, list[nn.Module]]:
    """Return the module that runs the decoder's layers, and them; `get_decoder` may give a model around it."""
    find: Any = getattr(model, "get_decoder", None)
    decoder: Any = find() if find else model
    for candidate in (decoder, getattr(decoder, "model", None), getattr(decoder, "text_model", None)):
        layers = getattr(candidate, "layers", None)
        if isinstance(layers, nn.ModuleList):
            return candidate, list(layers)
    return decoder, []


def self_attention(layer: nn.Module, kind: str) -> nn.Module | None:
    """Return the one child of `layer` that projects to queries, keys, values and back; None where none attends.

    Raises:
        InputError: there are several, or it attends with projections of another kind.
    """
    needed = ("q_proj", "k_proj", "v_proj", "head_dim", "config")
    named = [child for child in layer.children() if "Attention" in type(child).__name__ and not _crosses(child)]
    matching = [
        child
        for child in layer.children()
        if all(getattr(child, name, None) is not None for name in needed) and not _crosses(child)
        if output_projection(child) is not None
    ]
    if len(matching) > 1 or (named and not matching):
        problem = f"a decoder layer of {kind} has {len(matching)} self-attentions with q, k, v, o projections"
        raise InputError(f"{problem} ({', '.join(type(child).__name__ for child in named)})")
    return matching[0] if matching else None


def _crosses(module: nn.Module) -> bool:
    """Whether a module attends to something else than the text: transformers says so in the class's name alone."""
    return "CrossAttention" in type(module).__name__ or bool(getattr(module, "is_cross_attention", False))


def output_projection(attention: nn.Module) -> Any:
    """Return the projection of the heads' outputs into the residual stream, whatever it is called; or None."""
    return getattr(attention, "o_proj", None) or getattr(attention, "out_proj", None)


def _shape(attention: Any) -> tuple[int, int, int]:
    """Return heads, key heads and head size of an attention module."""
    size = int(attention.head_dim)
    return output_projection(attention).in_features // size, attention.k_proj.out_features // size, size


def eager(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return `function` such that `torch.compile` calls it and does not look into it.

    Layers that differ in their weights alone share one graph. What a function reads of its own layer from anywhere else
    would be that of the layer which was traced: another layer's virtual tokens, silently.
    """
    hook = torch.compiler.disable(function)
    hook.is_eager = True
    return hook


def is_eager(hook: Callable[..., Any]) -> bool:
    """Whether `eager` has returned `hook`."""
    return hasattr(hook, "is_eager")


def check_hooks(modules: Iterable[nn.Module], hooked: Iterable[nn.Module]) -> None:
    """Refuse hooks on modules inside a compiled one: what was compiled before does not call them.

    Args:
        modules: those that may be compiled.
        hooked: those that get hooks.

    Raises:
        InputError: one of them lies in a compiled module.
    """
    inside = set(hooked)
    for module in modules:
        if _is_compiled(module) and any(child in inside for child in module.modules() if child is not module):
            raise InputError(
                f"a compiled {type(module).__name__} does not call hooks on what is inside it",
                way_out="Let `train.compile` compile the decoder's parts",
            )


def _is_compiled(module: nn.Module) -> bool:
    if getattr(module, "_compiled_call_impl", None) is not None:
        return True
    forward = vars(module).get("forward")
    return hasattr(forward, "_torchdynamo_orig_callable") and not hasattr(forward, "_torchdynamo_disable")


_ALIKE: WeakKeyDictionary[nn.Module, float] = WeakKeyDictionary()
_FEW = range(1, 40)  # tokens of a pass: all of these are tried
_MANY = (61, 96, 130, 257)


def alike_from(model: nn.Module) -> float:
    """Return the tokens of a pass from which on each one's own part of it has the same bits, however many there are.

    Infinity: they never have. Tried, once a model, on every kind of linear module, norm and feed-forward net of the
    decoder, forward and backward: matrix libraries may add up a row's product in another order where there are more or
    fewer rows. Of few rows they do.
    """
    if model not in _ALIKE:
        _ALIKE[model] = max(_alike_from(*part) for part in _kinds_of_parts(decoder_of(model)))
    return _ALIKE[model]


def _kinds_of_parts(spec: DecoderSpec) -> Iterator[tuple[nn.Module, int]]:
    """Yield what a layer computes token by token, once a kind, with the width of its input."""
    seen = set()
    for layer in spec.layers:
        attention = self_attention(layer, spec.model_type)
        parts = [(child, spec.hidden_size) for child in layer.children() if child is not attention]
        linears = () if attention is None else (m for m in attention.modules() if isinstance(m, nn.Linear))
        for module, width in [*parts, *((linear, linear.in_features) for linear in linears)]:
            kind = (type(module), *(tuple(parameter.shape) for parameter in module.parameters()))
            if kind not in seen:
                seen.add(kind)
                yield module, width


def _alike_from(module: nn.Module, width: int) -> float:
    """Try a module on some numbers of tokens."""
    like = next((p for p in module.parameters() if p.is_floating_point()), None)
    if like is None:
        return 1
    generator = torch.Generator().manual_seed(0)
    counts = (*_FEW, *_MANY)
    x = torch.randn(1, counts[-1], width, generator=generator).to(like.device, like.dtype)
    results: list[tuple[torch.Tensor, torch.Tensor]] = []
    try:
        for rows in counts:
            given = x[:, :rows].clone().requires_grad_()
            with torch.enable_grad():
                out = module(given)
            results.append((out.detach(), torch.autograd.grad(out.square().sum(), given)[0]))
    except (TypeError, ValueError, AttributeError, RuntimeError):
        return math.inf  # it asks for more than a state
    differ = [
        rows
        for rows, of_rows in zip(counts, results, strict=True)
        if not all(torch.equal(a, b[:, :rows]) for a, b in zip(of_rows, results[-1], strict=True))
    ]
    least = max(differ, default=0) + 1
    return least if least in _FEW else math.inf


@contextmanager
def told(device: torch.device | str, *, padded: bool) -> Iterator[None]:
    """Tell transformers what the host knows, where it would ask a GPU at every pass and wait for the answer.

    Its three questions: whether a mask hides anything, whether a row holds several sequences (none does here), and
    whether a text has as many image tokens as there are visual tokens (`Family.expand` writes them).

    Args:
        device: of the model; a CPU may be asked.
        padded: whether the batch's 2D mask hides anything.
    """
    if torch.device(device).type == "cpu":
        yield
        return
    from transformers import masking_utils

    answers = {"fast_all": lambda mask: not padded, "find_packed_sequence_indices": lambda positions: None}
    names = [name for name in answers if hasattr(masking_utils, name)]
    with ExitStack() as stack:
        for name in names:
            stack.enter_context(patch.object(masking_utils, name, answers[name]))
        stack.enter_context(patch.dict(os.environ, {"TRANSFORMERS_DISABLE_TORCH_CHECK": "1"}))
        yield


Forwards = dict[nn.Module, Callable[..., Any]]


@contextmanager
def compiled_parts(model: nn.Module, forwards: Forwards) -> Iterator[None]:
    """Let the decoder's norms and feed-forward nets run compiled (`train.compile`) inside the block.

    Nothing is edited inside them, so one compilation serves all adapters and packs. Attention stays as it is: it calls
    what is attached, which is never compiled (`eager`). On leaving, all is as it was.

    What is compiled is compiled at its first call, for any length and number of rows.
    """
    spec = decoder_of(model)
    attentions = set(spec.attentions)
    parts = [part for layer in spec.layers for part in layer.children() if part not in attentions]
    for part in parts:
        if part not in forwards:
            forwards[part] = torch.compile(part.forward, dynamic=True)
        part.forward = forwards[part]
    try:
        yield
    finally:
        for part in parts:
            del part.forward


@contextmanager
def checkpointed_layers(model: nn.Module) -> Iterator[None]:
    """Let every layer keep its input alone for the backward pass, and compute the rest again.

    A third more work for a step whose memory hardly grows with the layers. What is attached is called again in the
    backward pass, and must give what it gave.
    """
    layers: Any = decoder_of(model).layers
    for layer in layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward
