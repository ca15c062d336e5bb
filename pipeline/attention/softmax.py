"""Softmax over [K_learn ; K] in two ways: two softmaxes merged by their log-sum-exp, or one over concatenated keys.

Merging (HiFICL Eq. 1) needs the skinny products with n virtual tokens alone. Concatenation copies keys and values once
a layer and needs a mask, which hides what is ahead but cannot be skipped as causal attention skips it. Below
`MOST_TOKENS` that costs less on a CPU than the dozen small operators of merging: 0.6 to 0.9 of the time up to 256
tokens, the same at 512, 1.3 at 1,024 (forward and backward, one thread). On a GPU the mask would cost the flash kernel.

Shapes: B batch, H query heads, H_kv key heads, T queries, S keys, n virtual tokens, d head size. The views of
transformers' [B, T, H, d] layout are used as they are, so that queries are not copied.
"""

from __future__ import annotations

import contextlib
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from pipeline.attention import kernels
from pipeline.attention.kernels import PreparedMask
from pipeline.core.errors import InputError


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


_INF = float("inf")


def context(call: kernels.Call, q: Tensor, k: Tensor, v: Tensor, groups: int) -> tuple[Tensor, Tensor, Any]:
    """Attend over the context; one query with grouped keys runs without repeating the cache."""
    batch, heads, queries, size = q.shape
    if groups == 1 or (queries > 1 and call.backend == "flash"):
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


def context_backward(
    call: kernels.Call, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, saved: Tensor, lse: Tensor, extra: Any,
    groups: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of q, k and v by way of the context, for the output and log-sum-exp that `combine` gives."""
    if call.backend == "flash":
        groups = 1  # it sums a group's gradients itself
    dq, dk, dv = kernels.backward(call, grad, q, repeat(k, groups), repeat(v, groups), saved, lse, extra)
    return dq, sum_groups(dk, groups), sum_groups(dv, groups)


def two(
    call: kernels.Call, q: Tensor, keys: Tensor, bias: Tensor | None, values: Tensor, context: Tensor, lse: Tensor,
    replaces: bool | Tensor,
) -> Tensor:  # fmt: skip
    """Attend over the virtual tokens by themselves and return what they and the context's attention give together.

    Virtual tokens [H, n, d] are those of all rows, whose queries are then one row's: a decoded token is one product.
    """
    mask = None if bias is None else kernels.prepare_mask(bias, q.dtype)
    alone = kernels.Call(call.backend, mask, False, call.scale)
    if mask is None and keys.dim() == values.dim() == 3:
        rows = q.transpose(0, 1)
        virtual, own_lse, _ = kernels.forward(alone, rows.flatten(1, 2)[None], keys[None], values[None])
        virtual, own_lse = (x[0].unflatten(1, rows.shape[1:3]).transpose(0, 1) for x in (virtual, own_lse))
    else:
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
    finite = lse.masked_fill(lse == -_INF, 0.0)
    if isinstance(replaces, Tensor):
        takes = replaces.unsqueeze(-1)
        merged = (context * alpha + shift).to(dtype)
        added = (context + shift).to(dtype)
        saved = torch.where(takes, merged, (context + alpha * shift).to(dtype))
        return torch.where(takes, merged, added), saved, torch.where(replaces, total, finite)
    return (context + shift).to(dtype), torch.addcmul(context.to(shift.dtype), alpha, shift).to(dtype), finite


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
    scores = product(q.to(wide), keys.to(wide)).mul_(scale)
    return scores if bias is None else scores.add_(bias)


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


MOST_TOKENS = 256


def short(
    q: Tensor, k: Tensor, keys: Tensor, bias: Tensor | None, per_query: Tensor | None, replaces: bool | Tensor,
    mask: PreparedMask | None,
) -> bool:  # fmt: skip
    """Whether attention over as many keys as queries is computed over concatenated keys when something learns.

    Where `q` needs no gradient, as in the lowest layer, merging skips the context's backward altogether.
    """
    if q.device.type != "cpu" or not q.requires_grad or replaces is not True or per_query is not None:
        return False
    one_row = (bias is None or bias.shape[-2] == 1) and (mask is None or mask.dead is None)
    return keys.dtype == q.dtype and 1 < q.shape[2] == k.shape[2] <= MOST_TOKENS and one_row


def concatenated(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, bias: Tensor | None, values: Tensor, *, mask: PreparedMask | None,
    scale: float, causal: bool,
) -> Tensor:  # fmt: skip
    """Return softmax(scale q [keys ; k] + [bias ; mask]) [values ; v], [B, H, T, d].

    Args:
        q: queries, [B, H, T, d].
        k: keys, [B, H_kv, T, d].
        v: values, like `k`.
        keys: virtual keys, [H, n, d] or [B, H, n, d].
        bias: added to the virtual logits, broadcastable to [B, H, 1, n]; None: nothing.
        values: virtual values, like `keys`.
        mask: what hides keys of the context, or None.
        scale: factor on the scores.
        causal: what `mask=None` means: causal, or everything seen.
    """
    batch, groups = q.shape[0], q.shape[1] // k.shape[1]
    all_keys = torch.cat([keys.expand(batch, -1, -1, -1), repeat(k, groups)], 2)
    all_values = torch.cat([values.expand(batch, -1, -1, -1), repeat(v, groups)], 2)
    tokens, virtual = q.shape[2], keys.shape[-2]
    if mask is None and bias is None:
        hides = _hides(tokens, virtual, causal, q.dtype)
    else:
        context = _hides(tokens, 0, causal, q.dtype) if mask is None else mask.bias
        learned = q.new_zeros(()) if bias is None else bias.to(q.dtype)
        shape = torch.broadcast_shapes((*learned.shape[:-2], 1, 1), (*context.shape[:-2], 1, 1))[:-2]
        hides = torch.cat([learned.expand(*shape, tokens, virtual), context.expand(*shape, tokens, tokens)], -1)
    return torch.nn.functional.scaled_dot_product_attention(q, all_keys, all_values, attn_mask=hides, scale=scale)


@lru_cache(maxsize=32)
def _hides(tokens: int, virtual: int, causal: bool, dtype: torch.dtype) -> Tensor:
    seen = torch.ones(1, 1, tokens, virtual + tokens, dtype=torch.bool)
    if causal:
        seen[..., virtual:] = seen[..., virtual:].tril()
    return torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, float("-inf"))
