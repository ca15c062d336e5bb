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

from pipeline.adapters.products import repeat

MOST_TOKENS = 256


def fits(
    q: Tensor, k: Tensor, keys: Tensor, bias: Tensor | None, per_query: Tensor | None, replaces: bool | Tensor
) -> bool:
    """Whether attention without a mask over as many keys as queries is computed here when something learns.

    Where `q` needs no gradient, as in the lowest layer, merging skips the context's backward altogether.
    """
    return (
        q.device.type == "cpu" and q.requires_grad and replaces is True and per_query is None
        and keys.dtype == q.dtype
        and 1 < q.shape[2] == k.shape[2] <= MOST_TOKENS
        and (bias is None or bias.shape[-2] == 1)
    )  # fmt: skip


def attention(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, bias: Tensor | None, values: Tensor, *, scale: float, causal: bool
) -> Tensor:
    """Return softmax(scale q [keys ; k] + [bias ; mask]) [values ; v], [B, H, T, d].

    Args:
        q: queries, [B, H, T, d].
        k: keys, [B, H_kv, T, d].
        v: values, like `k`.
        keys: virtual keys, [H, n, d] or [B, H, n, d].
        bias: added to the virtual logits, broadcastable to [B, H, 1, n]; None: nothing.
        values: virtual values, like `keys`.
        scale: factor on the scores.
        causal: whether a query sees no later key.
    """
    batch, groups = q.shape[0], q.shape[1] // k.shape[1]
    all_keys = torch.cat([keys.expand(batch, -1, -1, -1), repeat(k, groups)], 2)
    all_values = torch.cat([values.expand(batch, -1, -1, -1), repeat(v, groups)], 2)
    mask = _mask(q.shape[2], keys.shape[-2], causal, q.dtype)
    if bias is not None:
        bias = bias.to(q.dtype).expand(*bias.shape[:-2], q.shape[2], keys.shape[-2])
        while bias.dim() < 4:
            bias = bias.unsqueeze(0)
        context = mask[:, keys.shape[-2] :].expand(*bias.shape[:2], -1, -1)
        mask = torch.cat([bias, context], -1)
    return torch.nn.functional.scaled_dot_product_attention(q, all_keys, all_values, attn_mask=mask, scale=scale)


@lru_cache(maxsize=32)
def _mask(tokens: int, virtual: int, causal: bool, dtype: torch.dtype) -> Tensor:
    seen = torch.ones(tokens, virtual + tokens, dtype=torch.bool)
    if causal:
        seen[:, virtual:] = seen[:, virtual:].tril()
    return torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, float("-inf"))
