"""The parts of `attention`'s sum: the context's share, the virtual logits, how the two are merged and told apart again.

Shapes: B batch, H query heads, H_kv key heads, T queries, S keys, n virtual tokens, d head size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pipeline.adapters import kernels
from pipeline.adapters.kernels import PreparedMask
from pipeline.adapters.products import product, repeat
from pipeline.errors import InputError

_INF = float("inf")


def context(call: kernels.Call, q: Tensor, k: Tensor, v: Tensor, groups: int) -> tuple[Tensor, Tensor, Any]:
    """Attend over the context; one query with grouped keys runs without repeating the cache."""
    batch, heads, queries, size = q.shape
    if groups == 1:
        return kernels.forward(call, q, k, v)
    if queries > 1:
        return kernels.forward(call, q, repeat(k, groups), repeat(v, groups))
    mask = call.mask
    if mask is not None and mask.bias.shape[1] > 1:
        bias = mask.bias.expand(mask.bias.shape[0], heads, 1, -1)
        shape = (bias.shape[0], heads // groups, groups)
        dead = None if mask.dead is None else mask.dead.expand(bias.shape[0], heads, 1).reshape(shape)
        mask = PreparedMask(bias.reshape(*shape, -1), dead)
    folded = kernels.Call(call.backend, mask, call.causal, call.scale)
    out, lse, extra = kernels.forward(folded, q.reshape(batch, heads // groups, groups, size), k, v)
    # the random state that comes back is not used: there is no dropout
    return out.reshape(batch, heads, 1, size), lse.reshape(batch, heads, 1), extra


def two(
    call: kernels.Call, q: Tensor, keys: Tensor, bias: Tensor | None, values: Tensor, context: Tensor, lse: Tensor,
    replaces: bool | Tensor,
) -> Tensor:  # fmt: skip
    """Attend over the virtual tokens by themselves and return what they and the context's attention give together."""
    mask = None if bias is None else kernels.prepare_mask(bias, q.dtype)
    alone = kernels.Call(call.backend, mask, False, call.scale)
    virtual, own_lse, _ = kernels.forward(alone, q, *(x.expand(len(q), -1, -1, -1) for x in (keys, values)))
    alpha = (lse - own_lse).sigmoid_()
    if mask is not None and call.mask is not None:
        alpha.nan_to_num_(0.0)  # a row may see no token at all
    alpha = alpha.unsqueeze(-1).to(q.dtype)
    if isinstance(replaces, Tensor):
        context = context * torch.where(replaces.unsqueeze(-1), alpha, 1.0)
    elif replaces:
        return torch.lerp(virtual, context, alpha)
    return torch.addcmul(context, virtual, 1 - alpha)


def combine(
    context: Tensor, alpha: Tensor, shift: Tensor, lse: Tensor, total: Tensor, replaces: bool | Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the output, and the output and log-sum-exp that the context's backward is called with."""
    dtype = context.dtype
    if replaces is True:
        merged = torch.addcmul(shift, context.to(shift.dtype), alpha).to(dtype)
        return merged, merged, total
    own = lse.masked_fill(lse == -_INF, 0.0)
    if isinstance(replaces, Tensor):
        takes = replaces.unsqueeze(-1)
        merged = (context * alpha + shift).to(dtype)
        added = (context + shift).to(dtype)
        saved = torch.where(takes, merged, (context + alpha * shift).to(dtype))
        return torch.where(takes, merged, added), saved, torch.where(replaces, total, own)
    return (context + shift).to(dtype), torch.addcmul(context.to(shift.dtype), alpha, shift).to(dtype), own


def delta(g: Tensor, d_p: Tensor, p: Tensor, saved: Tensor, replaces: bool | Tensor) -> Tensor:
    """Return what every virtual token's gradient is measured against, [B, H, T, 1]."""
    if replaces is False:
        return (d_p * p).sum(-1, keepdim=True)
    merged = (g * saved).sum(-1, keepdim=True)
    if replaces is True:
        return merged
    return torch.where(replaces.unsqueeze(-1), merged, (d_p * p).sum(-1, keepdim=True))  # type: ignore[union-attr]


def logits(q: Tensor, keys: Tensor | None, bias: Tensor | None, scale: float, wide: torch.dtype) -> Tensor:
    """Return the virtual logits [B, H, T, n] in at least fp32, so that bf16 queries lose nothing more here."""
    shape = (*q.shape[:3], -1)
    if keys is None:
        if bias is None:
            raise InputError("virtual tokens need keys or logits")
        return bias.to(wide).expand(shape)
    found = product(q.to(wide), keys.to(wide)).mul_(scale)
    return found if bias is None else found.add_(bias)


def check(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor | None, values: Tensor | None, per_query: Tensor | None
) -> None:
    """Refuse tensors that do not fit together.

    Raises:
        InputError: the first that does not.
    """
    batch, heads, queries, size = q.shape
    if k.shape[:3] != v.shape[:3] or k.shape[0] != batch or k.shape[3] != size or heads % k.shape[1]:
        raise InputError(f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not fit together")
    for name, x in (("virtual keys", keys), ("virtual values", values)):
        if x is not None and (x.shape[-3] != heads or (x.dim() == 4 and x.shape[0] not in (1, batch))):
            raise InputError(f"{name} {tuple(x.shape)} do not fit q {tuple(q.shape)}")
    if per_query is not None and per_query.shape[:3] != q.shape[:3]:
        raise InputError(f"a shift per position {tuple(per_query.shape)} does not fit q {tuple(q.shape)}")
