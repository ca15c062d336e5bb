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
The virtual side is one kernel on CUDA (`fused`), a few products elsewhere.
Shapes: B batch, H query heads, H_kv key heads, T queries, S keys, n virtual tokens, d head size.
"""

from __future__ import annotations

import warnings
from functools import cache
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pipeline.attention import kernels, softmax
from pipeline.attention.kernels import PreparedMask
from pipeline.attention.reference import merge_attention_reference, mimic_attention_reference
from pipeline.attention.softmax import no_autocast, outer, product, weighted

__all__ = [
    "PreparedMask",
    "merge_attention",
    "merge_attention_reference",
    "mimic_attention",
    "mimic_attention_reference",
    "virtual_attention",
]

_INF = float("inf")
FUSED_ON = "cuda"  # the type of device on which the virtual side is one kernel


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
    bias, blends = log_z1.unsqueeze(-1), form == "blend"
    if shift.dim() == 4:
        return virtual_attention(q, k, v, bias=bias, per_query=shift, mask=mask, scale=scale, replaces=blends)
    return virtual_attention(q, k, v, bias=bias, values=shift.unsqueeze(-2), mask=mask, scale=scale, replaces=blends)


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
    softmax.check(q, k, v, keys, values, per_query)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    learns = torch.is_grad_enabled()
    if isinstance(mask, Tensor):
        mask = kernels.prepare_mask(mask, q.dtype)
    if (
        learns
        and keys is not None
        and values is not None
        and softmax.short(q, k, keys, bias, per_query, replaces, mask)
    ):
        with no_autocast(q):
            return softmax.concatenated(q, k, v, keys, bias, values, mask=mask, scale=scale, causal=causal)
    groups = q.shape[1] // k.shape[1]
    call = kernels.plan(q, k, v, mask, causal, scale)
    if isinstance(replaces, Tensor):
        replaces = replaces.view(-1, 1, 1)
    inputs = (q, k, v, keys, bias, values, per_query)
    learns = learns and any(x is not None and x.requires_grad for x in inputs)
    kernel = fused_on(q.device) if q.device.type == FUSED_ON and _current(q.device) else None
    if kernel is not None and keys is not None and values is not None and kernel.fits(q, keys, bias, values, per_query):
        if learns:
            return _FusedAttention.apply(q, k, v, keys, bias, values, call, groups, replaces, kernel)
        with no_autocast(q):
            context, lse, _ = softmax.context(call, q, k, v, groups)
            return kernel.forward(q, keys, bias, values, context, lse, scale, replaces, keeps=False)[0]
    if learns:
        return _VirtualAttention.apply(*inputs, call, groups, replaces)
    with no_autocast(q):
        return _without_gradient(*inputs, call, groups, replaces)


def _without_gradient(
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
    """Attend without keeping anything: a decoded token is too small to hide many operators.

    On a CPU the virtual tokens are a second attention; its log-sum-exp is log Z1, so alpha = sigmoid(log Z2 - log Z1).
    Elsewhere, and where virtual tokens are wider than the queries or have logits of their own, the context takes part
    as one more column of a softmax over them, with lse as its logit: its weight there is alpha.
    """
    context, lse, _ = softmax.context(call, q, k, v, groups)
    elsewhere = q.device.type != "cpu" or per_query is not None
    if not elsewhere and keys is not None and values is not None and keys.dtype == q.dtype:
        return softmax.two(call, q, keys, bias, values, context, lse, replaces)
    logits = softmax.logits(q, keys, bias, call.scale, lse.dtype)
    weights = torch.cat([logits, lse.unsqueeze(-1)], -1).softmax(-1)
    if call.mask is not None and bias is not None:
        weights = weights.nan_to_num_(0.0)  # a row may see no token at all
    shift = weighted(weights[..., :-1], values, per_query, lse.dtype)
    alpha = weights[..., -1:]
    if isinstance(replaces, Tensor):
        alpha = torch.where(replaces.unsqueeze(-1), alpha, 1.0)
    elif not replaces:
        return (context + shift).to(context.dtype)
    return torch.addcmul(shift, context.to(shift.dtype), alpha).to(context.dtype)


class _VirtualAttention(torch.autograd.Function):
    """`virtual_attention` and its backward; see the top of this file."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        q, k, v, keys, bias, values, per_query, call, groups, replaces = inputs  # as `_without_gradient` is given them
        with no_autocast(q):
            context, lse, extra = softmax.context(call, q, k, v, groups)
            wide = lse.dtype
            logits = softmax.logits(q, keys, bias, call.scale, wide)
            total = torch.logaddexp(torch.logsumexp(logits, -1), lse)
            if call.mask is not None:  # a row may see no token at all: its weights are zero
                total = total.masked_fill_(total == -_INF, 0.0)
            p = (logits - total.unsqueeze(-1)).exp_()
            alpha = (lse - total).exp_().unsqueeze(-1)
            shift = weighted(p, values, per_query, wide)
            out, saved, saved_lse = softmax.combine(context, alpha, shift, lse, total, replaces)
        context_keys = (k, v) if any(ctx.needs_input_grad[:3]) else (None, None)
        ctx.save_for_backward(q, *context_keys, keys, values, per_query, p, saved, saved_lse)
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
        with no_autocast(q):
            if any(needs[:3]):  # in the lowest layer nothing below learns: its flash backward is skipped
                dq, dk, dv = softmax.context_backward(call, grad, q, k, v, saved, saved_lse, ctx.extra, ctx.groups)
            g = grad.to(wide)
            d_p = torch.zeros_like(p) if values is None else product(g, values.to(wide))
            if per_query is not None:
                d_p[..., 0] += (g * per_query).sum(-1)
            d_logits = d_p.sub_(softmax.delta(g, d_p, p, saved, ctx.replaces)).mul_(p)
            if keys is not None:
                scaled = d_logits * call.scale  # n columns, where the products have d
                if needs[0]:
                    dq += weighted(scaled, keys, None, wide).to(q.dtype)
                if needs[3]:
                    d_keys = outer(scaled, q.to(wide), keys)
            if needs[4]:
                shape, dtype = ctx.bias
                d_bias = d_logits.sum_to_size(shape).to(dtype)
            if needs[5]:
                d_values = outer(p, g, values)
            if needs[6]:
                d_per_query = (p[..., :1] * g).to(per_query.dtype)
        return dq, dk, dv, d_keys, d_bias, d_values, d_per_query, None, None, None


class _FusedAttention(torch.autograd.Function):
    """`_VirtualAttention` with the virtual side as one kernel forward and one backward (`fused`)."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        q, k, v, keys, bias, values, call, groups, replaces, kernel = inputs
        with no_autocast(q):
            context, lse, extra = softmax.context(call, q, k, v, groups)
            out, saved, saved_lse, total = kernel.forward(
                q, keys, bias, values, context, lse, call.scale, replaces, keeps=True
            )
        context_keys = (k, v) if any(ctx.needs_input_grad[:3]) else (None, None)
        ctx.save_for_backward(q, *context_keys, keys, bias, values, saved, saved_lse, total)
        ctx.rest = call, groups, extra, replaces, kernel
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, keys, bias, values, saved, saved_lse, total = ctx.saved_tensors
        call, groups, extra, replaces, kernel = ctx.rest
        dq: Any = None
        dk = dv = None
        with no_autocast(q):
            if any(ctx.needs_input_grad[:3]):
                dq, dk, dv = softmax.context_backward(call, grad, q, k, v, saved, saved_lse, extra, groups)
            learned = kernel.backward(grad, q, keys, bias, values, saved, total, dq, call.scale, replaces)
        dq, d_keys, d_values, d_bias = learned
        return dq, dk, dv, d_keys, d_bias, d_values, None, None, None, None


def _current(device: torch.device) -> bool:
    """Whether kernels that are started now run on `device`, as Triton's do."""
    return device.index is None or device.index == torch.cuda.current_device()


@cache
def fused_on(device: torch.device) -> ModuleType | None:
    """Return the kernel's module where it compiles for `device` and gives what torch gives, tried once; else None."""
    try:
        from pipeline.attention import fused

        problem = fused_differs(fused, device, torch.bfloat16, tolerance=0.02)
    except Exception as error:  # noqa: BLE001  a compiler, a driver, a version: whatever it is, torch's operators do it
        text = str(error).strip().splitlines() or [""]
        problem = f"{type(error).__name__}: {text[0]}"
    if problem is None:
        return fused
    warnings.warn(f"virtual tokens run by torch's operators, for the Triton kernel fails: {problem}", stacklevel=2)
    return None


def fused_differs(kernel: ModuleType, device: torch.device, dtype: torch.dtype, *, tolerance: float) -> str | None:
    """Return how the kernel differs from torch's operators on a small case, or None.

    Args:
        kernel: `pipeline.attention.fused`.
        device: where it runs.
        dtype: of queries, keys and values.
        tolerance: of the largest difference, relative to the largest value.
    """
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int, to: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, to).requires_grad_()

    inputs = [drawn(2, 4, 37, 64), drawn(2, 2, 37, 64), drawn(2, 2, 37, 64)]
    inputs += [drawn(*shape, to=torch.float32) for shape in ((4, 3, 64), (4, 1, 3), (4, 3, 64))]
    q, k, v, keys, bias, values = inputs
    grad = drawn(2, 4, 37, 64).detach()
    call = kernels.plan(q, k, v, None, True, 0.125)
    made = []
    for out in (
        _FusedAttention.apply(q, k, v, keys, bias, values, call, 2, True, kernel),
        _VirtualAttention.apply(q, k, v, keys, bias, values, None, call, 2, True),
    ):
        made.append([out.detach(), *torch.autograd.grad(out, inputs, grad)])
    names = ("output", "dq", "dk", "dv", "d keys", "d bias", "d values")
    for name, fused, wanted in zip(names, *made, strict=True):
        gap = float((fused.double() - wanted.double()).abs().max() / wanted.double().abs().max())
        if not gap <= tolerance:
            return f"{name} is {gap:.2g} off"
    return None
