"""The states inside a decoder layer that are compared and edited, and the modules at which they can be had.

With h a layer's input, a what its self-attention gives and m what its feed-forward net (FFN, a module mostly called
`mlp`) gives, a layer computes the residual stream h + a + m. Its four states by name:

    attention      a
    residual-mid   h + a
    mlp            m
    residual       h + a + m, the layer's output
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from pipeline.backbones.base import gathered
from pipeline.backbones.decoder import DecoderSpec, check_hooks, eager, self_attention
from pipeline.config.trial import State
from pipeline.core.errors import InputError

_RESIDUAL = "Set point: residual, the layer's own output, which every decoder has"


@dataclass(frozen=True)
class _Inside:
    """What a layer has between its input and its output.

    Attributes:
        mlp: its feed-forward net.
        reader: the module that reads the residual stream between attention and FFN; None in a parallel block.
    """

    mlp: nn.Module
    reader: nn.Module | None


_INSIDE: WeakKeyDictionary[nn.Module, list[_Inside]] = WeakKeyDictionary()  # by decoder


def modules_at(spec: DecoderSpec, state: State) -> list[nn.Module]:
    """Return the module of each layer whose output the state is; of `residual-mid` the modules that read it.

    Raises:
        InputError: the decoder's layers have no such state, or none that one module gives.
    """
    if state == "residual":
        return spec.layers
    if state == "attention":
        return spec.attentions
    inside = _inside(spec)
    if state == "mlp":
        return [layer.mlp for layer in inside]
    readers = [layer.reader for layer in inside if layer.reader is not None]
    if len(readers) < len(inside):
        raise InputError(
            f"a decoder layer of {spec.model_type} does not read the residual stream between attention and FFN",
            way_out="Set point: attention",
        )
    return readers


@contextmanager
def recorded(spec: DecoderSpec, state: State, keep: Callable[[Tensor], Tensor] = lambda x: x) -> Iterator[list[Tensor]]:
    """Collect a state of every layer, in order of the layers, as it is after any edit.

    Args:
        spec: the decoder.
        state: which.
        keep: what of a layer's [B, T, D] is kept; the rest is let go as soon as the model has used it.

    Raises:
        InputError: as `modules_at`.
    """
    seen: list[Tensor] = []

    def note(module: nn.Module, args: Any, output: Any) -> None:
        seen.append(keep(output[0] if isinstance(output, tuple) else output))

    def note_input(module: nn.Module, args: Any) -> None:
        seen.append(keep(args[0]))

    modules = modules_at(spec, state)
    check_hooks([spec.decoder, *spec.layers], modules)
    if state == "residual-mid":
        hooks = [module.register_forward_pre_hook(eager(note_input)) for module in modules]
    else:
        hooks = [module.register_forward_hook(eager(note)) for module in modules]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _inside(spec: DecoderSpec) -> list[_Inside]:
    """Find every layer's FFN, once a decoder."""
    if spec.decoder not in _INSIDE:
        inside = []
        for layer in spec.layers:
            with gathered(layer):
                inside.append(_found(layer, spec))
        if any(parameter.is_meta for parameter in spec.decoder.parameters()):
            return inside  # not tried: it has no numbers
        _INSIDE[spec.decoder] = inside
    return _INSIDE[spec.decoder]


def _found(layer: nn.Module, spec: DecoderSpec) -> _Inside:
    """Take the one child with matrices beside self-attention for the FFN, and try whether it is."""
    attention = self_attention(layer, spec.model_type)
    if attention is None:
        raise InputError(f"a decoder layer of {spec.model_type} does not attend to the text", way_out=_RESIDUAL)
    others = {name: child for name, child in layer.named_children() if child is not attention}
    matrices = {name: child for name, child in others.items() if any(p.dim() > 1 for p in child.parameters())}
    if len(matrices) != 1:
        names = f" ({', '.join(matrices)})" if matrices else ""
        problem = f"a decoder layer of {spec.model_type} has {len(matrices)} feed-forward modules{names}"
        raise InputError(problem, way_out=_RESIDUAL)
    ((name, mlp),) = matrices.items()
    like = next(parameter for parameter in layer.parameters() if parameter.is_floating_point())
    if like.is_meta:
        return _Inside(mlp, None)
    try:
        return _Inside(mlp, _tried(layer, attention, mlp, spec.hidden_size, like))
    except (TypeError, ValueError, AttributeError, RuntimeError, KeyError) as error:
        problem = f"a decoder layer of {spec.model_type} does not add the output of its {name} to the residual stream"
        raise InputError(f"{problem} ({error})", way_out=_RESIDUAL) from None


@torch.no_grad()
def _tried(layer: nn.Module, attention: nn.Module, mlp: nn.Module, width: int, like: Tensor) -> nn.Module | None:
    """Run the layer with given outputs a of attention and m of the FFN; return who reads h + a.

    Small whole numbers, whose sums every dtype holds: what comes out is h + a + m to the bit, or something else is
    done to them (a norm behind the FFN, a factor).

    Raises:
        ValueError: what comes out is not h + a + m.
        TypeError, AttributeError, RuntimeError, KeyError: the layer asks for something else of its parts.
    """
    generator = torch.Generator().manual_seed(0)
    made = (torch.randint(-8, 9, (1, 2, width), generator=generator) for _ in range(3))
    h, a, m = (values.to(like.device, like.dtype) for values in made)
    needed = list(inspect.signature(layer.forward).parameters.values())[1:]
    nothing = {
        parameter.name: None
        for parameter in needed
        if parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    }
    readers: list[nn.Module] = []

    def look(module: nn.Module, args: tuple[Any, ...]) -> None:
        if args and isinstance(args[0], Tensor) and args[0].shape == h.shape and torch.equal(args[0], h + a):
            readers.append(module)

    hooks = [child.register_forward_pre_hook(look) for child in layer.children()]
    try:
        with _instead(layer, {attention: (a, None), mlp: m}):
            out: Any = layer.forward(h, **nothing)
    finally:
        for hook in hooks:
            hook.remove()
    out = out[0] if isinstance(out, tuple) else out
    if not torch.equal(out, h + a + m):
        raise ValueError("it is scaled or normed first")
    return readers[0] if len(readers) == 1 else None


class _Gives(nn.Module):
    """Gives a value whatever it is called with."""

    def __init__(self, value: Any) -> None:
        super().__init__()
        self.value = value

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.value


@contextmanager
def _instead(layer: nn.Module, values: dict[nn.Module, Any]) -> Iterator[None]:
    """Put modules that give these values in the place of some of a layer's, whose own hooks see nothing of it."""
    had = {name: child for name, child in layer.named_children() if child in values}
    try:
        for name, child in had.items():
            layer._modules[name] = _Gives(values[child])
        yield
    finally:
        layer._modules.update(had)
