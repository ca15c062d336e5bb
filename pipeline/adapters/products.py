"""The skinny products with n virtual tokens, and the repetition of grouped keys.

Shapes: B batch, H query heads, H_kv key heads, T queries, S keys, n virtual tokens, d head size. einsum finds the views
of transformers' [B, T, H, d] layout, so that queries are not copied.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.errors import InputError


def product(x: Tensor, y: Tensor) -> Tensor:
    """Return x [B, H, T, d] times y [(B,) H, n, d] transposed: [B, H, T, n]."""
    return torch.einsum("bhtd,hnd->bhtn" if y.dim() == 3 else "bhtd,bhnd->bhtn", x, y)


def weighted(p: Tensor, values: Tensor | None, per_query: Tensor | None, wide: torch.dtype) -> Tensor:
    """Return p [B, H, T, n] times values [(B,) H, n, d]: [B, H, T, d]; `per_query` belongs to token 0."""
    if values is None:
        if per_query is None:
            raise InputError("virtual tokens need values")
        return p[..., :1] * per_query.to(wide)
    out = torch.einsum("bhtn,hnd->bhtd" if values.dim() == 3 else "bhtn,bhnd->bhtd", p, values.to(wide))
    return out if per_query is None else out.addcmul_(p[..., :1], per_query.to(wide))


def outer(weights: Tensor, x: Tensor, like: Tensor) -> Tensor:
    """Return weights [B, H, T, n] transposed times x [B, H, T, d], summed over the batch where `like` has none."""
    return torch.einsum("bhtn,bhtd->hnd" if like.dim() == 3 else "bhtn,bhtd->bhnd", weights, x).to(like.dtype)


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
