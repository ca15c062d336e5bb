"""The virtual side of attention as one Triton kernel forward and one backward, in place of a dozen operators a layer.

Forward, each query row goes through the n virtual tokens as flash attention goes through blocks of keys, beginning at
the context's log-sum-exp: with m the highest logit so far,

    mass <- mass exp(m - m') + exp(z_i - m'),   acc <- acc exp(m - m') + exp(z_i - m') h_i,   m' = max(m, z_i)

Backward, weights are computed again as p_i = exp(z_i - total), and dz_i = p_i (dout . h_i - delta) as in `virtual`.
Sums are in fp32. Each block of rows writes its own share of the virtual tokens' gradients, which are then added up: no
atomics, so that equal inputs give equal bits. Grouped keys are the context's matter: virtual keys are per query head.

Shapes: B batch, H query heads, T queries, n virtual tokens, d head size. This file needs Triton; `virtual` tries it
on CUDA alone, and computes the same sums by torch's operators where it fails.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_ADDS, _REPLACES, _BY_ROW = 0, 1, 2  # whether virtual tokens take their mass from the context
_ROWS = 32  # queries of a program
_MOST_SIZE = 256
# Neither value nor alignment of these makes a kernel of its own: one a dtype and head size serves all methods.
_PLAIN = [
    "heads", "tokens", "n", "kind", "keeps", "biased", "queries", "lse_b", "lse_h", "key_b", "bias_b",
]  # fmt: skip


@triton.jit(do_not_specialize=_PLAIN)
def _forward_kernel(
    q, keys, bias, values, context, lse, takes, out, saved, total, saved_lse, heads, tokens, n, size, scale, kind,
    biased, keeps, q_b, q_h, q_t, context_b, context_h, context_t, out_b, out_h, out_t, lse_b, lse_h, key_b, bias_b,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    batch_head = tl.program_id(1).to(tl.int64)
    b, h = batch_head // heads, batch_head % heads
    t = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, COLUMNS)
    at, across = t[:, None].to(tl.int64), c[None, :]
    seen, wide = t < tokens, c < size
    inside = seen[:, None] & wide[None, :]
    query = tl.load(q + b * q_b + h * q_h + at * q_t + across, inside, 0.0).to(tl.float32) * scale
    context_mass = tl.load(lse + b * lse_b + h * lse_h + t, seen, 0.0).to(tl.float32)
    top = context_mass
    mass = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    for i in range(n):
        place = b * key_b + (h * n + i) * size + c
        key = tl.load(keys + place, wide, 0.0).to(tl.float32)
        value = tl.load(values + place, wide, 0.0).to(tl.float32)
        z = tl.sum(query * key[None, :], 1)
        z += tl.load(bias + b * bias_b + h * n + i, biased != 0, 0.0).to(tl.float32)
        higher = tl.maximum(top, z)
        finite = tl.where(higher == -float("inf"), 0.0, higher)  # a row may see nothing so far
        kept, weight = tl.exp(top - finite), tl.exp(z - finite)
        mass = mass * kept + weight
        acc = acc * kept[:, None] + weight[:, None] * value[None, :]
        top = higher
    finite = tl.where(top == -float("inf"), 0.0, top)
    rest = tl.exp(context_mass - finite)
    whole = mass + rest
    whole = tl.where(whole == 0.0, 1.0, whole)  # a row that sees no token at all: its weights are zero
    alpha, shift = rest / whole, acc / whole[:, None]
    all_mass = finite + tl.log(whole)
    from_context = context + b * context_b + h * context_h + at * context_t + across
    attended = tl.load(from_context, inside, 0.0).to(tl.float32)
    taken = kind != 0
    if kind == 2:
        taken = tl.load(takes + b) != 0
    result = tl.where(taken, alpha, 1.0)[:, None] * attended + shift
    place = b * out_b + h * out_h + at * out_t + across
    tl.store(out + place, result.to(out.dtype.element_ty), inside)
    if keeps != 0:
        flat = batch_head * tokens + t
        tl.store(total + flat, all_mass, seen)
        if kind != 1:
            for_context = tl.where(taken, result, attended + alpha[:, None] * shift)
            tl.store(saved + place, for_context.to(saved.dtype.element_ty), inside)
            finite = tl.where(context_mass == -float("inf"), 0.0, context_mass)
            tl.store(saved_lse + flat, tl.where(taken, all_mass, finite), seen)


@triton.jit(do_not_specialize=_PLAIN)
def _backward_kernel(
    grad, q, keys, bias, values, saved, total, takes, dq, shares, bias_shares, heads, tokens, n, size, scale, kind,
    biased, queries, grad_b, grad_h, grad_t, q_b, q_h, q_t, saved_b, saved_h, saved_t, dq_b, dq_h, dq_t, key_b, bias_b,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    batch_head = tl.program_id(1).to(tl.int64)
    b, h = batch_head // heads, batch_head % heads
    t = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, COLUMNS)
    seen, wide = t < tokens, c < size
    inside = seen[:, None] & wide[None, :]
    at, across = t[:, None].to(tl.int64), c[None, :]
    query = tl.load(q + b * q_b + h * q_h + at * q_t + across, inside, 0.0).to(tl.float32)
    g = tl.load(grad + b * grad_b + h * grad_h + at * grad_t + across, inside, 0.0).to(tl.float32)
    all_mass = tl.load(total + batch_head * tokens + t, seen, float("inf"))  # rows behind the end weigh nothing
    taken = kind != 0
    if kind == 2:
        taken = tl.load(takes + b) != 0
    merged = tl.load(saved + b * saved_b + h * saved_h + at * saved_t + across, inside, 0.0).to(tl.float32)
    delta = tl.sum(g * merged, 1)
    if kind != 1:
        shift = tl.zeros([ROWS], tl.float32)
        for i in range(n):
            place = b * key_b + (h * n + i) * size + c
            key = tl.load(keys + place, wide, 0.0).to(tl.float32)
            value = tl.load(values + place, wide, 0.0).to(tl.float32)
            z = tl.sum(query * key[None, :], 1) * scale
            z += tl.load(bias + b * bias_b + h * n + i, biased != 0, 0.0).to(tl.float32)
            shift += tl.exp(z - all_mass) * tl.sum(g * value[None, :], 1)
        delta = tl.where(taken, delta, shift)
    d_query = tl.zeros([ROWS, COLUMNS], tl.float32)
    share = (batch_head * tl.num_programs(0) + tl.program_id(0)) * n
    values_shares = shares + tl.num_programs(1).to(tl.int64) * tl.num_programs(0) * n * size
    for i in range(n):
        place = b * key_b + (h * n + i) * size + c
        key = tl.load(keys + place, wide, 0.0).to(tl.float32)
        value = tl.load(values + place, wide, 0.0).to(tl.float32)
        z = tl.sum(query * key[None, :], 1) * scale
        z += tl.load(bias + b * bias_b + h * n + i, biased != 0, 0.0).to(tl.float32)
        p = tl.exp(z - all_mass)
        dz = p * (tl.sum(g * value[None, :], 1) - delta)
        tl.store(shares + (share + i) * size + c, tl.sum(dz[:, None] * query, 0) * scale, wide)
        tl.store(values_shares + (share + i) * size + c, tl.sum(p[:, None] * g, 0), wide)
        tl.store(bias_shares + share + i, tl.sum(dz, 0), biased != 0)
        d_query += dz[:, None] * key[None, :]
    if queries != 0:
        to = dq + b * dq_b + h * dq_h + at * dq_t + across
        before = tl.load(to, inside, 0.0).to(tl.float32)
        tl.store(to, (before + d_query * scale).to(dq.dtype.element_ty), inside)


def fits(q: Tensor, keys: Tensor | None, bias: Tensor | None, values: Tensor | None, per_query: Tensor | None) -> bool:
    """Whether the kernel computes this: virtual keys and values, logits that do not depend on the position besides."""
    if keys is None or values is None or per_query is not None or values.dtype != keys.dtype:
        return False
    if torch.float64 in (keys.dtype, q.dtype) or q.shape[-1] > _MOST_SIZE or 0 in q.shape:
        return False
    return keys.shape == values.shape and (bias is None or (bias.dim() >= 2 and bias.shape[-2] == 1))


def forward(
    q: Tensor, keys: Tensor, bias: Tensor | None, values: Tensor, context: Tensor, lse: Tensor, scale: float,
    replaces: bool | Tensor, *, keeps: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Merge the context's attention with the virtual tokens'.

    Args:
        q: queries, [B, H, T, d].
        keys: virtual keys, [H, n, d] or [B, H, n, d].
        bias: added to the virtual logits, broadcastable to [B, H, 1, n]; None: nothing.
        values: virtual values, like `keys`.
        context: attention over the context, [B, H, T, d].
        lse: its log-sum-exp, [B, H, T].
        scale: factor on the scores.
        replaces: as in `virtual_attention`; per row [B, 1, 1].
        keeps: whether a backward follows.

    Returns:
        The output [B, H, T, d]; and for the backward the output and log-sum-exp [B, H, T] that the context's is called
        with, and log(Z1 + Z2), [B, H, T].
    """
    batch, heads, tokens, size = q.shape
    keys, values, bias = _placed(keys, values, bias, heads)
    kind, takes = _kind(replaces, lse)
    q, context, lse = _rows(q), _rows(context), _rows(lse)
    out = torch.empty_like(context)
    saved = torch.empty_like(context) if keeps and kind != _REPLACES else out
    total = torch.empty(lse.shape, dtype=torch.float32, device=lse.device) if keeps else lse
    saved_lse = torch.empty_like(total) if keeps and kind != _REPLACES else total
    rows = 1 if tokens == 1 else _ROWS
    _forward_kernel[triton.cdiv(tokens, rows), batch * heads](
        q, keys, keys if bias is None else bias, values, context, lse, takes, out, saved, total, saved_lse,
        heads, tokens, keys.shape[-2], size, scale, kind, int(bias is not None), int(keeps),
        *q.stride()[:3], *context.stride()[:3], *out.stride()[:3], *lse.stride()[:2], _step(keys, 3), _step(bias, 2),
        ROWS=rows, COLUMNS=triton.next_power_of_2(size), num_warps=1 if rows == 1 else _warps(size),
    )  # fmt: skip
    return out, saved, saved_lse, total


def backward(
    grad: Tensor, q: Tensor, keys: Tensor, bias: Tensor | None, values: Tensor, saved: Tensor, total: Tensor,
    dq: Tensor | None, scale: float, replaces: bool | Tensor,
) -> tuple[Tensor | None, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Return dq and the gradients of virtual keys, virtual values and bias, each in its own shape and dtype.

    Args:
        grad: of the output, [B, H, T, d].
        q: as in `forward`, like keys, bias, values, scale and replaces.
        keys: see `q`.
        bias: see `q`.
        values: see `q`.
        saved: what `forward` gave.
        total: what `forward` gave.
        dq: gradient of the queries by way of the context, which the virtual tokens' is added to; None: not wanted.
        scale: see `q`.
        replaces: see `q`.
    """
    batch, heads, tokens, size = q.shape
    placed_keys, placed_values, placed_bias = _placed(keys, values, bias, heads)
    kind, takes = _kind(replaces, total)
    grad, q, saved = _rows(grad), _rows(q), _rows(saved)
    to = grad if dq is None else dq
    blocks, n = triton.cdiv(tokens, _ROWS), keys.shape[-2]
    shares = torch.empty(2, batch, heads, blocks, n, size, dtype=torch.float32, device=q.device)
    bias_shares = shares if bias is None else shares.new_empty(batch, heads, blocks, n)
    _backward_kernel[blocks, batch * heads](
        grad, q, placed_keys, placed_keys if placed_bias is None else placed_bias, placed_values, saved, total, takes,
        to, shares, bias_shares, heads, tokens, n, size, scale, kind, int(bias is not None), int(dq is not None),
        *grad.stride()[:3], *q.stride()[:3], *saved.stride()[:3], *to.stride()[:3], _step(placed_keys, 3),
        _step(placed_bias, 2), ROWS=_ROWS, COLUMNS=triton.next_power_of_2(size), num_warps=_warps(size),
    )  # fmt: skip
    d_keys, d_values = shares.sum((1, 3) if keys.dim() == 3 or len(keys) == 1 else 3).to(keys.dtype).unbind(0)
    d_bias = None
    if bias is not None:
        d_bias = bias_shares.sum(2, keepdim=True).sum_to_size(bias.shape).to(bias.dtype)
    return dq, d_keys.view(keys.shape), d_values.view(values.shape), d_bias


def _placed(keys: Tensor, values: Tensor, bias: Tensor | None, heads: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Lay out virtual tokens as the kernel reads them: without gaps, [H, n, d] or [B, H, n, d] and [(B,) H, n]."""
    if bias is not None:
        bias = bias.squeeze(-2)
        bias = bias.expand(*bias.shape[:-2], heads, keys.shape[-2]).contiguous()
    return keys.contiguous(), values.contiguous(), bias


def _step(x: Tensor | None, shared: int) -> int:
    """Return how far apart two rows' virtual tokens lie: 0 where all rows have the same (`shared` dimensions)."""
    return 0 if x is None or x.dim() == shared or len(x) == 1 else x.stride(0)


def _kind(replaces: bool | Tensor, like: Tensor) -> tuple[int, Tensor]:
    if isinstance(replaces, Tensor):
        return _BY_ROW, replaces.reshape(-1).to(torch.int32)
    return (_REPLACES if replaces else _ADDS), like


def _warps(size: int) -> int:
    return 8 if size > 128 else 4


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
