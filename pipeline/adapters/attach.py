"""Attach adapters to a transformers model for the length of a `with` block, several at once where they pack."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from pipeline.adapters.base import Adapter, AttentionAdapter, HiddenAdapter, WeightsAdapter, parts_of
from pipeline.adapters.edits import AttentionEdit, HiddenEdit, Rows
from pipeline.adapters.interface import edited_attention
from pipeline.adapters.weights import WeightsEdit, edited_weights
from pipeline.backbones.decoder import DecoderSpec, decoder_of
from pipeline.backbones.states import modules_at
from pipeline.errors import InputError


class Pack:
    """Adapters that share one frozen backbone; row b of a batch uses `adapters[rows[b]]`.

    Args:
        adapters: one, or several of packable methods (methods, sizes and variants may differ).
        rows: [B], the adapter of each row; None with a single adapter. It may be set anew before every step. In
            `generate` with beams a row's beams follow it.

    Raises:
        InputError: a method that does not pack, or rows that name no adapter.
    """

    def __init__(self, adapters: Adapter | Sequence[Adapter], rows: Tensor | Sequence[int] | None = None) -> None:
        self.adapters: list[Adapter] = [adapters] if isinstance(adapters, Adapter) else list(adapters)
        if not self.adapters:
            raise InputError("a pack needs an adapter")
        if len(self.adapters) > 1:
            for adapter in self.adapters:
                if not adapter.packable:
                    raise InputError(f"method '{adapter.name}' does not pack", way_out="Attach it alone")
        self._rows = Rows(len(self.adapters))
        self.rows = rows  # type: ignore[assignment]

    @property
    def rows(self) -> Tensor | None:
        """The adapter of each row of the batch, [B]."""
        return self._rows.index

    @rows.setter
    def rows(self, rows: Tensor | Sequence[int] | None) -> None:
        self._rows.set(rows)

    def seed(self, seeds: Mapping[int, int]) -> None:
        """Start each adapter's stream of dropout masks anew; `seeds` by the adapter's number."""
        self._rows.seed(seeds)

    @property
    def widths(self) -> dict[int, int]:
        """The length that an adapter's own rows are padded to where it is alone: its dropout masks have that shape."""
        return self._rows.widths

    @widths.setter
    def widths(self, widths: dict[int, int]) -> None:
        self._rows.widths = widths

    @property
    def images(self) -> tuple[int, ...]:
        """How many images each row of the batch has, for adapters of a vision tower; () says one each."""
        return self._rows.images

    @images.setter
    def images(self, images: tuple[int, ...]) -> None:
        self._rows.images = images


@contextmanager
def attach(
    model: nn.Module, adapter: Adapter | Sequence[Adapter] | Pack, rows: Tensor | Sequence[int] | None = None
) -> Iterator[Pack]:
    """Let `model` compute with the adapter inside the block; on leaving, everything is as it was.

    Inside, the backbone's parameters are frozen, and gradients reach the adapter's alone. Blocks may be nested where
    they edit different things (an adapter of attention inside LoRA).

    Args:
        model: a transformers model.
        adapter: one adapter, several that pack, or a `Pack`.
        rows: see `Pack`.

    Yields:
        The pack, whose `rows` may be set before every step.

    Raises:
        InputError: the adapter was made for another backbone, or the same place is edited already.
    """
    if isinstance(adapter, Pack):
        pack = adapter
        if rows is not None:
            pack.rows = rows  # type: ignore[assignment]
    else:
        pack = Pack(adapter, rows)
    spec = decoder_of(model)
    for one in pack.adapters:
        one.backbone.check(spec, f"method '{one.name}'")
    attention = dict(parts_of(pack.adapters, AttentionAdapter))
    hidden = dict(parts_of(pack.adapters, HiddenAdapter))
    weights = dict(parts_of(pack.adapters, WeightsAdapter))
    with ExitStack() as stack:
        stack.enter_context(_frozen(model))
        if len(pack.adapters) == 1:  # PEFT's own layers
            for part in weights.values():
                stack.enter_context(part.injected(model))
        elif weights:
            stack.enter_context(edited_weights(model, WeightsEdit(weights, pack._rows, spec)))
        if attention:
            stack.enter_context(_edited_attention(spec, AttentionEdit(attention, pack._rows, spec)))
        if hidden:
            stack.enter_context(_edited_hidden(spec, hidden, pack._rows))
        yield pack


_FROZEN: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
_HIDDEN: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Freeze the model's parameters; the outermost block does it, for inside it they may be another adapter's."""
    if model in _FROZEN:
        yield
        return
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    _FROZEN[model] = True
    try:
        for parameter, _ in before:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter, flag in before:
            parameter.requires_grad_(flag)
        del _FROZEN[model]


@contextmanager
def _edited_attention(spec: DecoderSpec, edit: AttentionEdit) -> Iterator[None]:
    # Parameters change between steps, so the virtual tokens are computed anew at the start of every forward pass; not
    # for every decoded token.
    def refresh(module: nn.Module, args: object, kwargs: dict[str, Any]) -> None:
        edit.refresh(continues=_continues(kwargs))

    with edited_attention(spec, edit.layers), _hooks() as hooks:
        hooks.append(spec.decoder.register_forward_pre_hook(refresh, with_kwargs=True))
        yield


def _continues(kwargs: dict[str, Any]) -> bool:
    """Whether a forward pass goes on behind a cache and learns nothing."""
    cache = kwargs.get("past_key_values")
    return cache is not None and not torch.is_grad_enabled() and int(cache.get_seq_length()) > 0


@contextmanager
def _edited_hidden(spec: DecoderSpec, parts: Mapping[int, HiddenAdapter], rows: Rows) -> Iterator[None]:
    if spec.decoder in _HIDDEN:
        raise InputError(
            "an adapter of hidden states is attached to this model already",
            way_out="Leave the first `attach`, or give both to one `attach` with rows",
        )
    _HIDDEN[spec.decoder] = True
    try:
        with _hooks() as hooks:
            for state in sorted({part.state for part in parts.values()}):
                edit = HiddenEdit({index: part for index, part in parts.items() if part.state == state}, rows)
                hooks.append(spec.decoder.register_forward_pre_hook(edit.before))
                for index, module in enumerate(modules_at(spec, state)):
                    # first in line, so that whoever records hidden states sees the edited one
                    hooks.append(module.register_forward_hook(edit.hook(index), prepend=True))
            yield
    finally:
        del _HIDDEN[spec.decoder]


@contextmanager
def _hooks() -> Iterator[list[torch.utils.hooks.RemovableHandle]]:
    handles: list[torch.utils.hooks.RemovableHandle] = []
    try:
        yield handles
    finally:
        for handle in handles:
            handle.remove()
