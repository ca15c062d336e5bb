"""Virtual tokens in front of the context's keys and values: for short sequences on a CPU, where operators cost most.

Softmax over [K_learn ; K] is the definition (HiFICL Eq. 1). Joining copies keys and values once a layer and needs a
mask, which hides what is ahead but cannot be skipped as causal attention skips it. Below `MOST_TOKENS` that costs less
than the dozen small operators of merging: 0.6 to 0.9 of the time up to 256 tokens, the same at 512, 1.3 at 1,024
(forward and backward, one thread). On a GPU the mask would cost the flash kernel.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from pipeline.attention.kernels import PreparedMask
from pipeline.attention.merged import repeat

MOST_TOKENS = 256


def fits(
    q: Tensor, k: Tensor, keys: Tensor, bias: Tensor | None, per_query: Tensor | None, replaces: bool | Tensor,
    mask: PreparedMask | None,
) -> bool:  # fmt: skip
    """Whether attention over as many keys as queries is computed here when something learns.

    Where `q` needs no gradient, as in the lowest layer, merging skips the context's backward altogether.
    """
    if q.device.type != "cpu" or not q.requires_grad or replaces is not True or per_query is not None:
        return False
    one_row = (bias is None or bias.shape[-2] == 1) and (mask is None or mask.dead is None)
    return keys.dtype == q.dtype and 1 < q.shape[2] == k.shape[2] <= MOST_TOKENS and one_row


def attention(
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
