"""The equations as they are printed, by explicit concatenation: slow, on any device, the oracle of the tests."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

_INF = float("inf")


def merge_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_learn: Tensor,
    v_learn: Tensor,
    *,
    mask: Tensor | None = None,
    scale: float | None = None,
    virtual_mask: Tensor | None = None,
    alpha: Literal["full", "one"] = "full",
) -> Tensor:
    """Compute HiFICL Eq. (1) over the concatenated keys and values; arguments as `merge_attention`."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    n, batch = k_learn.shape[-2], q.shape[0]
    k, v = _repeat(k, q), _repeat(v, q)
    k_learn, v_learn = (x.expand(batch, *x.shape[-3:]) for x in (k_learn, v_learn))
    scores = _masked(q @ torch.cat([k_learn, k], 2).transpose(-1, -2) * scale, mask, virtual_mask, n)
    weights = _softmax(scores)
    if alpha == "full":
        return weights @ torch.cat([v_learn, v], 2)
    return _softmax(scores[..., n:]) @ v + weights[..., :n] @ v_learn


def mimic_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    shift: Tensor,
    log_z1: Tensor,
    *,
    mask: Tensor | None = None,
    scale: float | None = None,
    form: Literal["vector", "blend"] = "vector",
) -> Tensor:
    """Compute MimIC's SA + mu v, or (1 - mu) SA + mu h, with mu = Z1 / (Z1 + Z2); arguments as `mimic_attention`."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    k, v = _repeat(k, q), _repeat(v, q)
    scores = _masked(q @ k.transpose(-1, -2) * scale, mask, None, 0)
    dead = (scores == -_INF).all(-1)
    log_z2 = torch.logsumexp(scores.masked_fill(dead.unsqueeze(-1), 0.0), -1).masked_fill(dead, -_INF)
    mu = torch.sigmoid(log_z1 - log_z2).unsqueeze(-1)
    attended = _softmax(scores) @ v
    shift = shift if shift.dim() == 4 else shift.unsqueeze(-2)
    return attended + mu * shift if form == "vector" else (1 - mu) * attended + mu * shift


def _repeat(x: Tensor, q: Tensor) -> Tensor:
    return x.repeat_interleave(q.shape[1] // x.shape[1], 1)


def _masked(scores: Tensor, mask: Tensor | None, virtual_mask: Tensor | None, n: int) -> Tensor:
    """Apply both masks to scores [B, H, T, n + S]."""
    queries, keys = scores.shape[-2], scores.shape[-1] - n
    if mask is None:
        mask = torch.ones(queries, keys, dtype=torch.bool, device=scores.device).tril(keys - queries)
    if virtual_mask is None:
        virtual_mask = torch.ones(n, dtype=torch.bool, device=scores.device)
    virtual_mask = virtual_mask.unsqueeze(-2)
    parts = []
    for part, hides in ((scores[..., :n], virtual_mask), (scores[..., n:], mask)):
        parts.append(part.masked_fill(~hides, -_INF) if hides.dtype == torch.bool else part + hides)
    return torch.cat(parts, -1)


def _softmax(scores: Tensor) -> Tensor:
    """Softmax in which a row that sees nothing is zero and passes no gradient."""
    dead = (scores == -_INF).all(-1, keepdim=True)
    return scores.masked_fill(dead, 0.0).softmax(-1).masked_fill(dead, 0.0)
