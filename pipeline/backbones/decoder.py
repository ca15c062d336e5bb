"""The decoder inside any transformers model: its layers, attention modules and sizes, found without names of models."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache, partial
from importlib.util import find_spec
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pipeline.core.errors import InputError, nearest


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


# -- frozen weights in 8 or 4 bits -------------------------------------------------------------------------------------

# it says once a process, at import, that an optional kernel of the hub is not there
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
QUANTIZED = ("none", "int8", "nf4")


def check_quantization(kind: str, where: str) -> None:
    """See that there is such a way to store weights, and that what it takes is installed; `none` needs nothing.

    Raises:
        InputError: there is not, or it is missing.
    """
    if kind not in QUANTIZED:
        raise InputError(f"unknown way to store weights '{kind}'", where=where, way_out=nearest(kind, QUANTIZED))
    if kind != "none" and find_spec("bitsandbytes") is None:
        problem = f"weights in {kind} need the package bitsandbytes, which is missing"
        way_out = "Install it: pip install bitsandbytes (the extra `quantized`), or set train.quantize to none"
        raise InputError(problem, where=where, way_out=way_out)


def quantizable(model: nn.Module) -> dict[str, nn.Linear]:
    """Return the linear modules of the decoder's layers, by name: what is stored in 8 or 4 bits.

    Vision tower, connector, embeddings, output and norms stay as they are, as do experts that are no linear modules.
    """
    lists = [child for child in decoder_of(model).decoder.children() if isinstance(child, nn.ModuleList)]
    inside = {id(module) for layers in lists for module in layers.modules()}
    return {
        name: module for name, module in model.named_modules() if type(module) is nn.Linear and id(module) in inside
    }


def quantize(model: nn.Module, kind: str) -> None:
    """Store the decoder's linear weights in 8 or 4 bits, in place, where they are; on the meta device too.

    Args:
        model: a transformers model.
        kind: `int8` (a scale a row, the largest value at 127) or `nf4` (QLoRA, arXiv 2305.14314: NormalFloat in blocks
            of 64, whose scales are stored in 8 bits).
    """
    check_quantization(kind, "quantize")
    from bitsandbytes import functional
    from bitsandbytes import nn as few_bits

    # its table for scales is kept as the first call made it, and meta tensors have no numbers
    functional.name2qmap.setdefault("dynamic", functional.create_dynamic_map())
    linears = quantizable(model)
    for name in list(linears):
        linear = linears.pop(name)  # and so it is gone before the next but one is made
        shape, data = (linear.in_features, linear.out_features, False), linear.weight.data
        made: Any
        if kind == "nf4":
            made = few_bits.Linear4bit(*shape, compute_dtype=data.dtype, quant_type=kind, device="meta")
            packed, state = functional.quantize_4bit(data, quant_type=kind, compress_statistics=True)
            made.quant_state = state
            stored: dict[str, Any] = {"quant_state": state, "quant_type": kind, "bnb_quantized": True}
            made.weight = few_bits.Params4bit(packed, module=made, **stored)
        else:
            made = few_bits.Linear8bitLt(*shape, has_fp16_weights=False, device="meta")
            rows, scales, _ = functional.int8_vectorwise_quant(data.half())
            made.weight = few_bits.Int8Params(rows, requires_grad=False, CB=rows, SCB=scales)
        made.bias = linear.bias
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, made)
    setattr(model, f"is_loaded_in_{8 if kind == 'int8' else 4}bit", True)  # which PEFT asks
    settle(model)


def is_quantized(model: nn.Module) -> bool:
    """Whether some of a model's weights are codes of few bits and no numbers."""
    return not all(parameter.is_floating_point() for parameter in model.parameters())


def settle(model: nn.Module) -> None:
    """Let a model's modules of bitsandbytes, if any, multiply by their weights alone, whatever else is in the batch.

    LLM.int8() rounds activations too and singles out columns by all rows of a batch, so a trial in a pack, or an answer
    behind a cache, would be another one. On a CPU with AVX512-BF16 a 4-bit weight is packed anew at its first pass
    without a gradient, and passes after it have none.
    """
    if not (getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False)):
        return
    from bitsandbytes import nn as few_bits

    for module in model.modules():
        if isinstance(module, few_bits.Linear4bit):
            module.support_avx512bf16_for_cpu = False
        elif isinstance(module, few_bits.Linear8bitLt) and not isinstance(module, _int8_linear()):
            module.init_8bit_state()
            module.eval().__class__ = _int8_linear()


class _Int8Product(torch.autograd.Function):
    """y = x W^T + b with W = q s / 127, which is made for each pass and not kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, q: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(q, scales)
        return nn.functional.linear(x, _wide(q, scales, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        q, scales = ctx.saved_tensors
        return grad @ _wide(q, scales, grad.dtype), None, None, None


def _wide(q: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Return rows of int8 as numbers, each rounded once to `dtype`."""
    return torch.mul(q, scales[:, None] / 127, out=torch.empty(q.shape, dtype=dtype, device=q.device))


@cache
def _int8_linear() -> Any:
    from bitsandbytes import nn as few_bits

    class Int8Linear(few_bits.Linear8bitLt):
        """bitsandbytes' module, for whom and PEFT it is one of theirs, without its rounded activations."""

        def forward(self, x: Tensor) -> Tensor:
            bias = None if self.bias is None else self.bias.to(x.dtype)
            return _Int8Product.apply(x, self.state.CB, self.state.SCB, bias)

    return Int8Linear


def stored_bytes(shape: Sequence[int], kind: str) -> float:
    """Return what `quantize` makes of a weight [out, in]: its values, and their scales."""
    rows, values = shape[0], math.prod(shape)
    return values + 4 * rows if kind == "int8" else values / 2 + values / 64 * (1 + 4 / 256)


def weight_bytes(model: nn.Module) -> int:
    """Return what a model's parameters take here, scales of those in few bits included; of those in parts, its own."""
    total = sum(getattr(parameter, "ds_tensor", parameter).nbytes for parameter in model.parameters())
    for module in model.modules():
        if (state := getattr(getattr(module, "weight", None), "quant_state", None)) is not None:
            total += state.absmax.nbytes + state.state2.absmax.nbytes
        elif isinstance(scales := getattr(getattr(module, "state", None), "SCB", None), Tensor):
            total += scales.nbytes
    return total


def dequantized(linear: Any) -> Tensor:
    """Return a linear module's weight [out, in] as it multiplies, however it is stored."""
    if (state := getattr(linear.weight, "quant_state", None)) is not None:
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(linear.weight.data, state)
    if linear.weight.dtype == torch.int8:
        return _wide(linear.state.CB, linear.state.SCB, torch.float32)
    return linear.weight
