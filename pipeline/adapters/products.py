"""The skinny products with n virtual tokens, and the repetition of grouped keys.

Shapes: B batch, H query heads, H_kv key heads, T queries, S keys, n virtual tokens, d head size. The views of
transformers' [B, T, H, d] layout are used as they are, so that queries are not copied.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

from pipeline.errors import InputError


def product(x: Tensor, y: Tensor) -> Tensor:
    """Return x [B, H, T, d] times y [(B,) H, n, d] transposed: [B, H, T, n]."""
    if y.dim() == 4:
        return torch.einsum("bhtd,bhnd->bhtn", x, y)
    return _by_head(x, y.transpose(1, 2))


def weighted(p: Tensor, values: Tensor | None, per_query: Tensor | None, wide: torch.dtype) -> Tensor:
    """Return p [B, H, T, n] times values [(B,) H, n, d]: [B, H, T, d]; `per_query` belongs to token 0."""
    if values is None:
        if per_query is None:
            raise InputError("virtual tokens need values")
        return p[..., :1] * per_query.to(wide)
    values = values.to(wide)
    out = torch.einsum("bhtn,bhnd->bhtd", p, values) if values.dim() == 4 else _by_head(p, values)
    return out if per_query is None else out.addcmul_(p[..., :1], per_query.to(wide))


def _by_head(x: Tensor, y: Tensor) -> Tensor:
    """Return x [B, H, T, a] times y [H, a, b], one product a head: what einsum does, at a third of its overhead."""
    batch, heads, length, _ = x.shape
    flat = x.transpose(0, 1).reshape(heads, batch * length, -1)
    return torch.bmm(flat, y).view(heads, batch, length, -1).transpose(0, 1)


def outer(weights: Tensor, x: Tensor, like: Tensor) -> Tensor:
    """Return weights [B, H, T, n] transposed times x [B, H, T, d], summed over the batch where `like` has none."""
    if like.dim() == 4:
        return torch.einsum("bhtn,bhtd->bhnd", weights, x).to(like.dtype)
    left, right = (part.transpose(0, 1).reshape(part.shape[1], -1, part.shape[-1]) for part in (weights, x))
    return torch.bmm(left.transpose(1, 2), right).to(like.dtype)


def repeat(x: Tensor, groups: int) -> Tensor:
    """Give every query head its key head, [B, H_kv, S, d] -> [B, H, S, d]."""
    if groups == 1:
        return x
    batch, heads, length, size = x.shape
    return x[:, :, None].expand(batch, heads, groups, length, size).reshape(batch, heads * groups, length, size)


def sum_groups(x: Tensor, groups: int) -> Tensor:
    """Sum the gradient of `repeat` back, [B, H, S, d] -> [B, H_kv, S, d]."""
    if groups == 1:
        return x
    batch, heads, length, size = x.shape
    return x.view(batch, heads // groups, groups, length, size).sum(2)


def no_autocast(x: Tensor) -> Any:
    """Return a context without autocast, which would narrow the fp32 virtual side that keeps low precision exact."""
    kind = x.device.type
    narrows = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.autocast(kind, enabled=False) if narrows else contextlib.nullcontext()
