"""One function registered with transformers: every decoder calls it after RoPE and cache update.

It looks up the edit of the module that calls. Modules without one (cross-attention, other models that share the
configuration) run plain SDPA. The mask function of the same name is SDPA's, so causality, padding and sliding
windows arrive as a mask.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from pipeline.backbones.decoder import DecoderSpec
from pipeline.core.errors import InputError

NAME = "hificl"
_UNSUPPORTED = ("softcap", "position_bias", "s_aux")  # they change the scores, and with them Z2

# edit(q, k, v, mask, scale=, causal=) -> [B, H, T, d]
LayerEdit = Callable[..., Tensor]
_EDITS: WeakKeyDictionary[nn.Module, LayerEdit] = WeakKeyDictionary()


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend with the edit of `module`; the signature and the returned [B, T, H, d] are transformers'."""
    edit = _EDITS.get(module)
    if edit is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, is_causal=is_causal, **kwargs
        )
    if dropout > 0:
        raise InputError("attention dropout is not defined for edited attention", way_out="Call model.eval()")
    for name in _UNSUPPORTED:
        if kwargs.get(name) is not None:
            raise InputError(f"attention with '{name}' cannot be edited")
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    queries = query.shape[2]
    if attention_mask is None and causal and 1 < queries < key.shape[2]:
        # transformers leaves the mask out here only for the prefill of an empty static cache
        key, value = key[:, :, :queries], value[:, :, :queries]
    output = edit(query, key, value, attention_mask, scale=scaling, causal=causal)
    return output.transpose(1, 2).contiguous(), None


@cache
def _register() -> None:
    """Make the function known to transformers: at its first use, since to import it takes seconds.

    A sweep's stage and driver know methods by name and never attend.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, sdpa_mask)


@contextmanager
def edited_attention(spec: DecoderSpec, edits: list[LayerEdit]) -> Iterator[None]:
    """Give each layer's attention its edit, and set the text configuration to call it; undone on leaving.

    Raises:
        InputError: the attention of this model is edited already.
    """
    if any(module in _EDITS for module in spec.attentions):
        raise InputError(
            "an adapter of attention is attached to this model already",
            way_out="Leave the first `attach`, or give both to one `attach` with rows",
        )
    _register()
    config, before = spec.text_config, spec.text_config._attn_implementation
    try:
        _set_implementation(config, NAME)
        for module, edit in zip(spec.attentions, edits, strict=True):
            _EDITS[module] = edit
        yield
    finally:
        for module in spec.attentions:
            _EDITS.pop(module, None)
        _set_implementation(config, before)


def _set_implementation(config: Any, name: str | None) -> None:
    # As a mapping it is set on this configuration alone: a flat one (Idefics) holds the vision tower's below it.
    config._attn_implementation = {"": name}
