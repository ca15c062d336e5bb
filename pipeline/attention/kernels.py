"""Attention over the context that also returns its log-sum-exp, and its backward for *any* output and log-sum-exp.

PyTorch's public function hides the log-sum-exp; the operators under it return it. Their backward takes the output
only through delta = rowsum(dout * out) and the weights only through exp(score - lse), so a caller may hand it a merged
output and log-sum-exp: that is what makes attention over further, separate keys exact without concatenation.

Backends: `cpu` (flash for CPU), `flash` and `efficient` (CUDA), `plain` (any device and dtype, by public functions
alone). The operators are private to PyTorch: one whose signature is not the one that is called here is not used.
Shapes: B batch, H query heads, T query positions, S key positions, d head size. `flash` takes keys as they are grouped,
the others want them with H heads.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten
_INF = float("inf")
CUDA = "cuda"  # the type of device whose operators `flash` and `efficient` are
_LSE_BLOCK = 32  # the efficient kernel's log-sum-exp is padded to whole blocks of queries
_BIAS_BLOCK = 16  # its bias must start every row at an aligned address


@dataclass(frozen=True)
class PreparedMask:
    """A mask as the kernels want it.

    Attributes:
        bias: additive, in the queries' dtype, four dimensions, broadcastable to [B, H, T, S].
        dead: bool [B or 1, H or 1, T]: rows that may see nothing (left padding). None: there is none; asked on a CPU
            only, where the answer costs no wait.
    """

    bias: Tensor
    dead: Tensor | None

    @cached_property
    def aligned(self) -> Tensor:
        """`bias` as the efficient kernel reads it, laid out once for all layers and both passes.

        A row of -inf alone is not defined in that kernel: it sees all here, and its result is dropped.
        """
        return _aligned(self.bias if self.dead is None else self.bias.masked_fill(self.dead.unsqueeze(-1), 0.0))


def _aligned(bias: Tensor) -> Tensor:
    keys = bias.shape[-1]
    padding = -keys % _BIAS_BLOCK
    if padding:
        return torch.nn.functional.pad(bias, (0, padding))[..., :keys]
    return bias if bias.stride(-1) == 1 and bias.stride(-2) % _BIAS_BLOCK == 0 else bias.contiguous()


@dataclass(frozen=True)
class Call:
    """One call's settings, kept for its backward."""

    backend: str
    mask: PreparedMask | None
    causal: bool
    scale: float

    @property
    def dead(self) -> Tensor | None:
        """Rows that may see nothing, where there may be any."""
        return None if self.mask is None else self.mask.dead


def prepare_mask(mask: Tensor, dtype: torch.dtype) -> PreparedMask:
    """Turn a bool (True = seen) or additive mask, broadcastable to [B, H, T, S], into the kernels' form."""
    while mask.dim() < 4:
        mask = mask.unsqueeze(0)
    if mask.dtype == torch.bool:
        dead = ~mask.any(-1)
        bias = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -_INF)
    else:
        dead = (mask == -_INF).all(-1)
        bias = mask.to(dtype)
    return PreparedMask(bias, None if mask.device.type == "cpu" and not dead.any() else dead)


def causal_mask(queries: int, keys: int, device: torch.device) -> Tensor:
    """Return the bool mask [T, S] in which the last query sees all keys (lower-right aligned)."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)


def plan(q: Tensor, k: Tensor, v: Tensor, mask: PreparedMask | Tensor | None, causal: bool, scale: float) -> Call:
    """Choose a backend and settle the mask; without a mask, `causal` means lower-right aligned."""
    if isinstance(mask, Tensor):
        mask = prepare_mask(mask, q.dtype)
    if mask is None and causal:
        queries, keys = q.shape[2], k.shape[2]
        if queries == 1:
            causal = False
        elif queries != keys:  # the kernels' own causal flag is aligned to the upper left
            mask, causal = prepare_mask(causal_mask(queries, keys, q.device), q.dtype), False
    elif mask is not None:
        causal = False
    return Call(_backend(q, v, mask), mask, causal, scale)


def _backend(q: Tensor, v: Tensor, mask: PreparedMask | None) -> str:
    size = q.shape[-1]
    if size != v.shape[-1] or 0 in q.shape:
        return "plain"
    if q.device.type == "cpu":
        return "cpu" if _as_called("cpu") else "plain"
    if q.device.type not in (CUDA, "meta"):  # without numbers, sizes are a card's
        return "plain"
    low = q.dtype in (torch.float16, torch.bfloat16)
    if low and mask is None and size % 8 == 0 and size <= 256 and _as_called("flash"):
        return "flash"
    if ((low and size % 8 == 0) or (q.dtype == torch.float32 and size % 4 == 0)) and _as_called("efficient"):
        return "efficient"
    return "plain"


# The operators' signatures as they are called here, of torch 2.11 to 2.13: arguments in order, and numbers of results.
_SIGNATURES: dict[str, dict[str, tuple[str, int]]] = {
    "cpu": {
        "_scaled_dot_product_flash_attention_for_cpu": ("query key value dropout_p is_causal attn_mask scale", 2),
        "_scaled_dot_product_flash_attention_for_cpu_backward": (
            "grad_out query key value out logsumexp dropout_p is_causal attn_mask scale", 3,
        ),
    },
    "flash": {
        "_scaled_dot_product_flash_attention": ("query key value dropout_p is_causal return_debug_mask scale", 9),
        "_scaled_dot_product_flash_attention_backward": (
            "grad_out query key value out logsumexp cum_seq_q cum_seq_k max_q max_k dropout_p is_causal philox_seed "
            "philox_offset scale", 3,
        ),
    },
    "efficient": {
        "_scaled_dot_product_efficient_attention": (
            "query key value attn_bias compute_log_sumexp dropout_p is_causal scale", 4,
        ),
        "_scaled_dot_product_efficient_attention_backward": (
            "grad_out_ query key value attn_bias out logsumexp philox_seed philox_offset dropout_p grad_input_mask "
            "is_causal scale", 4,
        ),
    },
}  # fmt: skip


@cache
def _as_called(backend: str) -> bool:
    """Whether a backend's operators are there with the signatures that they are called by; if not, say so once."""
    for name, (arguments, results) in _SIGNATURES[backend].items():
        schema: Any = getattr(getattr(getattr(aten, name, None), "default", None), "_schema", None)
        present, wanted = [] if schema is None else schema.arguments, arguments.split()
        named = [argument.name for argument in present][: len(wanted)] == wanted
        further = [argument for argument in present[len(wanted) :] if not argument.has_default_value()]
        if not named or further or len(schema.returns) != results:
            problem = f"torch {torch.__version__} has no {name} as it is called here"
            warnings.warn(f"{problem}: attention runs without it, and slower", stacklevel=2)
            return False
    return True


def forward(call: Call, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Any]:
    """Return (output [B, H, T, d], log-sum-exp [B, H, T] in at least fp32, what `backward` needs besides).

    Rows that see nothing get output 0 and log-sum-exp -inf.
    """
    output, lse, extra = _FORWARD[call.backend](call, q, k, v)
    if call.dead is not None:
        lse = lse.masked_fill(call.dead, -_INF)
    return output, lse, extra


def backward(
    call: Call, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, extra: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k, v for weights exp(score - lse) and delta = rowsum(grad * out).

    `lse` must be finite; rows that see nothing get no gradient.
    """
    return _BACKWARD[call.backend](call, grad, q, k, v, out, lse, extra)


# ---------------------------------------------------------------------------------------------------------- CPU flash


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _cpu_forward(call: Call, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Any]:
    bias = call.mask.bias if call.mask else None
    output, lse = aten._scaled_dot_product_flash_attention_for_cpu(
        _rows(q), _rows(k), _rows(v), 0.0, call.causal, attn_mask=bias, scale=call.scale
    )
    return output, lse, None


def _cpu_backward(
    call: Call, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, extra: Any
) -> tuple[Tensor, Tensor, Tensor]:
    bias = call.mask.bias if call.mask else None
    return aten._scaled_dot_product_flash_attention_for_cpu_backward(
        _rows(grad), _rows(q), _rows(k), _rows(v), out, lse, 0.0, call.causal, attn_mask=bias, scale=call.scale
    )


# --------------------------------------------------------------------------------------------------------------- CUDA


def _flash_forward(call: Call, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Any]:
    output, lse, cum_q, cum_k, max_q, max_k, seed, offset, _ = aten._scaled_dot_product_flash_attention(
        _rows(q), _rows(k), _rows(v), 0.0, call.causal, False, scale=call.scale
    )
    return output, lse, (cum_q, cum_k, max_q, max_k, seed, offset)


def _flash_backward(
    call: Call, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, extra: Any
) -> tuple[Tensor, Tensor, Tensor]:
    *lengths, seed, offset = extra
    inputs = (_rows(grad), _rows(q), _rows(k), _rows(v), out, lse.float().contiguous(), *lengths)
    kernel = aten._scaled_dot_product_flash_attention_backward
    return kernel(*inputs, 0.0, call.causal, seed, offset, scale=call.scale)


def _efficient_bias(call: Call, q: Tensor, k: Tensor) -> Tensor | None:
    if call.mask is None:
        return None
    bias, shape = call.mask.aligned, (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    if bias.shape[-1] != k.shape[2]:  # one value for all keys
        bias = _aligned(bias.expand(*bias.shape[:-1], k.shape[2]))
    return bias.expand(shape)


def _efficient_forward(call: Call, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Any]:
    output, lse, seed, offset = aten._scaled_dot_product_efficient_attention(
        _rows(q), _rows(k), _rows(v), _efficient_bias(call, q, k), True, 0.0, call.causal, scale=call.scale
    )
    if call.dead is not None:
        output.masked_fill_(call.dead.unsqueeze(-1), 0.0)  # in its place: the backward wants its layout
    return output, lse[..., : q.shape[2]], (seed, offset)


def _efficient_backward(
    call: Call, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, extra: Any
) -> tuple[Tensor, Tensor, Tensor]:
    if call.dead is not None:
        grad = grad.masked_fill(call.dead.unsqueeze(-1), 0.0)
    padded = torch.nn.functional.pad(lse.float(), (0, -lse.shape[-1] % _LSE_BLOCK), value=_INF).contiguous()
    bias = _efficient_bias(call, q, k)
    # in half precision the kernel takes the output's strides for granted: without gaps, [B, T, H, d]
    out = out.transpose(1, 2).contiguous().transpose(1, 2)
    inputs, needed = (_rows(grad), _rows(q), _rows(k), _rows(v), bias, out, padded), [True, True, True, False]
    kernel = aten._scaled_dot_product_efficient_attention_backward
    dq, dk, dv, _ = kernel(*inputs, *extra, 0.0, needed, call.causal, scale=call.scale)
    return dq, dk, dv


# ---------------------------------------------------------------------------------------------------- plain, anywhere


def _scores(call: Call, q: Tensor, k: Tensor) -> Tensor:
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = torch.matmul(q.to(wide), k.to(wide).transpose(-1, -2)) * call.scale
    if call.mask is not None:
        return scores + call.mask.bias
    if call.causal:
        return scores.masked_fill(~causal_mask(q.shape[2], k.shape[2], q.device), -_INF)
    return scores


def _plain_forward(call: Call, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Any]:
    scores = _scores(call, q, k)
    lse = torch.logsumexp(scores, -1)
    weights = (scores - lse.masked_fill(lse == -_INF, 0.0).unsqueeze(-1)).exp()
    return torch.matmul(weights, v.to(weights.dtype)).to(q.dtype), lse, None


def _plain_backward(
    call: Call, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, extra: Any
) -> tuple[Tensor, Tensor, Tensor]:
    scores = _scores(call, q, k)
    weights = (scores - lse.unsqueeze(-1)).exp()
    wide = weights.dtype
    grad, out = grad.to(wide), out.to(wide)
    delta = (grad * out).sum(-1, keepdim=True)
    d_scores = weights * (torch.matmul(grad, v.to(wide).transpose(-1, -2)) - delta) * call.scale
    dq = torch.matmul(d_scores, k.to(wide))
    dk = torch.matmul(d_scores.transpose(-1, -2), q.to(wide))
    dv = torch.matmul(weights.transpose(-1, -2), grad)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


_Forward = Callable[[Call, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Any]]
_Backward = Callable[[Call, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Any], tuple[Tensor, Tensor, Tensor]]
_FORWARD: dict[str, _Forward] = {
    "cpu": _cpu_forward,
    "flash": _flash_forward,
    "efficient": _efficient_forward,
    "plain": _plain_forward,
}
_BACKWARD: dict[str, _Backward] = {
    "cpu": _cpu_backward,
    "flash": _flash_backward,
    "efficient": _efficient_backward,
    "plain": _plain_backward,
}
