"""Attention over the context plus virtual tokens, exact, without concatenation.

Every method that edits attention is one case of the same sum. With context attention SA(q), Z2 = sum_j exp(s q.k_j),
virtual logits z_i, Z1 = sum_i exp(z_i), alpha = Z2 / (Z1 + Z2), p_i = exp(z_i) / (Z1 + Z2) and virtual values h_i:

    replaces:  out = alpha SA(q) + sum_i p_i h_i      HiFICL Eq. (1), z_i = s q.k_learn_i; MimIC `blend` and `linear`
    adds:      out =       SA(q) + sum_i p_i h_i      HiFICL's `alpha=1`; MimIC `vector`, z = log Z1 = w.q + b

Backward. For `replaces` the context's weights are exp(score - L) with L = log(Z1 + Z2), and delta = dout . out: the
flash backward is called with the merged output and L. For `adds`, d out / d lse is folded into the same call through
out' = SA + alpha sum_i p_i h_i. The virtual side is a few products with n columns:

    dz = p * (dout . h - delta),   delta = dout . out (replaces) or sum_i p_i dout . h_i (adds)

K_learn is per query head, so concatenation would repeat grouped keys and copy the whole cache at every decoded token.
Shapes: B batch, H query heads, H_kv key heads, T queries, S keys, n virtual tokens, d head size.
"""

from __future__ import annotations

import contextlib
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pipeline.adapters import kernels
from pipeline.adapters.kernels import PreparedMask
from pipeline.adapters.products import outer, product, repeat, sum_groups, weighted
from pipeline.adapters.reference import merge_attention_reference, mimic_attention_reference
from pipeline.errors import InputError

__all__ = [
    "PreparedMask",
    "merge_attention",
    "merge_attention_reference",
    "mimic_attention",
    "mimic_attention_reference",
    "virtual_attention",
]

_INF = float("inf")


def merge_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_learn: Tensor,
    v_learn: Tensor,
    *,
    mask: Tensor | PreparedMask | None = None,
    scale: float | None = None,
    virtual_mask: Tensor | None = None,
    alpha: Literal["full", "one"] = "full",
) -> Tensor:
    """Attend over virtual tokens and context: softmax over [K_learn ; K] applied to [V_learn ; V] (HiFICL Eq. 1).

    Args:
        q: queries, [B, H, T, d].
        k: keys, [B, H_kv, S, d], H a multiple of H_kv.
        v: values, like `k`.
        k_learn: virtual keys, [H, n, d] or [B, H, n, d]; they may be wider than `q` (fp32 beside bf16).
        v_learn: virtual values, like `k_learn`.
        mask: None (causal, lower-right aligned), or bool (True = seen) or additive, broadcastable to [B, H, T, S].
            Virtual tokens are seen by every query.
        scale: factor on the scores; None is 1 / sqrt(d).
        virtual_mask: bool (True = seen) or additive, broadcastable to [B, H, n]: hides padded virtual tokens.
        alpha: `full` is Eq. (1); `one` leaves the context's share whole, SA(q) + beta V_learn (HiFICL Table 2).

    Returns:
        [B, H, T, d], in the dtype of `q`. A row that sees no context attends over the virtual tokens alone.

    Raises:
        InputError: shapes do not fit.
    """
    bias = None
    if virtual_mask is not None:
        bias = virtual_mask
        if bias.dtype == torch.bool:
            bias = torch.zeros(bias.shape, dtype=k_learn.dtype, device=bias.device).masked_fill_(~bias, -_INF)
        while bias.dim() < 2:
            bias = bias.unsqueeze(0)
        bias = bias.unsqueeze(-2)  # every query position
    return virtual_attention(
        q, k, v, keys=k_learn, bias=bias, values=v_learn, mask=mask, scale=scale, replaces=alpha == "full"
    )


def mimic_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    shift: Tensor,
    log_z1: Tensor,
    *,
    mask: Tensor | PreparedMask | None = None,
    scale: float | None = None,
    form: Literal["vector", "blend"] = "vector",
) -> Tensor:
    """Shift the attention's output by mu = Z1 / (Z1 + Z2) times a learned vector (MimIC Sec. 3.1).

    `vector`: SA(q) + mu shift. `blend`: (1 - mu) SA(q) + mu shift; with a shift per position this is the linear shift.

    Args:
        q: queries, [B, H, T, d].
        k: keys, [B, H_kv, S, d].
        v: values, like `k`.
        shift: [H, d], [B, H, d], or one per position [B, H, T, d].
        log_z1: log Z1, [B, H, T].
        mask: as in `merge_attention`; Z2 is summed over what it lets through.
        scale: factor on the scores; None is 1 / sqrt(d).
        form: see above.

    Returns:
        [B, H, T, d], in the dtype of `q`.

    Raises:
        InputError: shapes do not fit.
    """
    per_query = shift if shift.dim() == 4 else None
    return virtual_attention(
        q,
        k,
        v,
        bias=log_z1.unsqueeze(-1),
        values=None if shift.dim() == 4 else shift.unsqueeze(-2),
        per_query=per_query,
        mask=mask,
        scale=scale,
        replaces=form == "blend",
    )


def virtual_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    keys: Tensor | None = None,
    bias: Tensor | None = None,
    values: Tensor | None = None,
    per_query: Tensor | None = None,
    mask: Tensor | PreparedMask | None = None,
    scale: float | None = None,
    replaces: bool | Tensor = True,
    causal: bool = True,
) -> Tensor:
    """Compute the sum at the top of this file, in its general form.

    Args:
        q: queries, [B, H, T, d].
        k: keys, [B, H_kv, S, d].
        v: values, like `k`.
        keys: virtual keys, [H, n, d] or [B, H, n, d]; their logits are scale q.key.
        bias: added to the virtual logits, broadcastable to [B, H, T, n]; without `keys`, the logits themselves.
        values: virtual values, [H, n, d] or [B, H, n, d].
        per_query: added to the value of virtual token 0, one per position, [B, H, T, d].
        mask: None, a mask, or a prepared one.
        scale: factor on the scores; None is 1 / sqrt(d).
        replaces: whether virtual tokens take their mass from the context; bool, or one per row of the batch, [B].
        causal: what `mask=None` means: causal, or everything seen.

    Returns:
        [B, H, T, d].

    Raises:
        InputError: shapes do not fit.
    """
    _check(q, k, v, keys, values, per_query)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    groups = q.shape[1] // k.shape[1]
    call = kernels.plan(q, k, v, mask, causal, scale)
    if isinstance(replaces, Tensor):
        replaces = replaces.view(-1, 1, 1)
    return _VirtualAttention.apply(q, k, v, keys, bias, values, per_query, call, groups, replaces)


class _VirtualAttention(torch.autograd.Function):
    """`virtual_attention` and its backward; see the top of this file."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        keys: Tensor | None,
        bias: Tensor | None,
        values: Tensor | None,
        per_query: Tensor | None,
        call: kernels.Call,
        groups: int,
        replaces: bool | Tensor,
    ) -> Tensor:
        with _no_autocast(q):
            context, lse, extra = _context(call, q, k, v, groups)
            wide = lse.dtype
            logits = _logits(q, keys, bias, call.scale, wide)
            total = torch.logaddexp(torch.logsumexp(logits, -1), lse)
            if call.mask is not None:  # a row may see no token at all: its weights are zero
                total = total.masked_fill_(total == -_INF, 0.0)
            p = (logits - total.unsqueeze(-1)).exp_()
            alpha = (lse - total).exp_().unsqueeze(-1)
            shift = weighted(p, values, per_query, wide)
            needs = ctx.needs_input_grad
            out, saved, saved_lse = _combine(context, alpha, shift, lse, total, replaces, any(needs))
        if not any(needs):
            return out
        context_needed = any(needs[:3])
        ctx.save_for_backward(
            q,
            k if context_needed else None,
            v if context_needed else None,
            keys,
            values,
            per_query,
            p,
            saved,
            saved_lse,
        )
        ctx.call, ctx.groups, ctx.extra, ctx.replaces = call, groups, extra, replaces
        ctx.bias = (bias.shape, bias.dtype) if bias is not None else None
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, keys, values, per_query, p, saved, saved_lse = ctx.saved_tensors
        call, needs, wide = ctx.call, ctx.needs_input_grad, p.dtype
        dq: Any = None
        dk = dv = d_keys = d_bias = d_values = d_per_query = None
        with _no_autocast(q):
            if any(needs[:3]):  # in the lowest layer nothing below learns: its flash backward is skipped
                full_k, full_v = repeat(k, ctx.groups), repeat(v, ctx.groups)
                dq, dk, dv = kernels.backward(call, grad, q, full_k, full_v, saved, saved_lse, ctx.extra)
                dk, dv = sum_groups(dk, ctx.groups), sum_groups(dv, ctx.groups)
            g = grad.to(wide)
            d_p = torch.zeros_like(p) if values is None else product(g, values.to(wide))
            if per_query is not None:
                d_p[..., 0] += (g * per_query).sum(-1)
            d_logits = d_p.sub_(_delta(g, d_p, p, saved, ctx.replaces)).mul_(p)
            if keys is not None:
                if needs[0]:
                    dq += weighted(d_logits, keys, None, wide).mul_(call.scale).to(q.dtype)
                if needs[3]:
                    d_keys = outer(d_logits, q.to(wide), keys).mul_(call.scale)
            if needs[4]:
                shape, dtype = ctx.bias
                d_bias = d_logits.sum_to_size(shape).to(dtype)
            if needs[5]:
                d_values = outer(p, g, values)
            if needs[6]:
                d_per_query = (p[..., :1] * g).to(per_query.dtype)
        return dq, dk, dv, d_keys, d_bias, d_values, d_per_query, None, None, None


def _context(call: kernels.Call, q: Tensor, k: Tensor, v: Tensor, groups: int) -> tuple[Tensor, Tensor, Any]:
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
        mask = PreparedMask(bias.reshape(*shape, -1), mask.dead.expand(bias.shape[0], heads, 1).reshape(shape))
    folded = kernels.Call(call.backend, mask, call.causal, call.scale)
    out, lse, extra = kernels.forward(folded, q.reshape(batch, heads // groups, groups, size), k, v)
    # the random state that comes back is not used: there is no dropout
    return out.reshape(batch, heads, 1, size), lse.reshape(batch, heads, 1), extra


def _combine(
    context: Tensor, alpha: Tensor, shift: Tensor, lse: Tensor, total: Tensor, replaces: bool | Tensor, learns: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return the output, and the output and log-sum-exp that the context's backward is called with."""
    dtype = context.dtype
    if replaces is True:
        merged = (context * alpha).add_(shift).to(dtype)
        return merged, merged, total
    if replaces is False and not learns:
        return (context + shift).to(dtype), None, None
    own = lse.masked_fill(lse == -_INF, 0.0)
    if isinstance(replaces, Tensor):
        takes = replaces.unsqueeze(-1)
        merged = (context * alpha + shift).to(dtype)
        added = (context + shift).to(dtype)
        saved = torch.where(takes, merged, (context + alpha * shift).to(dtype))
        return torch.where(takes, merged, added), saved, torch.where(replaces, total, own)
    return (context + shift).to(dtype), torch.addcmul(context.to(shift.dtype), alpha, shift).to(dtype), own


def _delta(g: Tensor, d_p: Tensor, p: Tensor, saved: Tensor, replaces: bool | Tensor) -> Tensor:
    """Return what every virtual token's gradient is measured against, [B, H, T, 1]."""
    if replaces is False:
        return (d_p * p).sum(-1, keepdim=True)
    merged = (g * saved).sum(-1, keepdim=True)
    if replaces is True:
        return merged
    return torch.where(replaces.unsqueeze(-1), merged, (d_p * p).sum(-1, keepdim=True))  # type: ignore[union-attr]


def _logits(q: Tensor, keys: Tensor | None, bias: Tensor | None, scale: float, wide: torch.dtype) -> Tensor:
    """Return the virtual logits [B, H, T, n] in at least fp32, so that bf16 queries lose nothing more here."""
    shape = (*q.shape[:3], -1)
    if keys is None:
        if bias is None:
            raise InputError("virtual tokens need keys or logits")
        return bias.to(wide).expand(shape)
    logits = product(q.to(wide), keys.to(wide)).mul_(scale)
    return logits if bias is None else logits.add_(bias)


def _no_autocast(x: Tensor) -> Any:
    """Autocast would narrow the fp32 virtual side, which is what keeps low precision exact enough."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else contextlib.nullcontext()


def _check(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor | None, values: Tensor | None, per_query: Tensor | None
) -> None:
    batch, heads, queries, size = q.shape
    if k.shape[:3] != v.shape[:3] or k.shape[0] != batch or k.shape[3] != size or heads % k.shape[1]:
        raise InputError(f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not fit together")
    for name, x in (("virtual keys", keys), ("virtual values", values)):
        if x is not None and (x.shape[-3] != heads or (x.dim() == 4 and x.shape[0] not in (1, batch))):
            raise InputError(f"{name} {tuple(x.shape)} do not fit q {tuple(q.shape)}")
    if per_query is not None and per_query.shape[:3] != q.shape[:3]:
        raise InputError(f"a shift per position {tuple(per_query.shape)} does not fit q {tuple(q.shape)}")
