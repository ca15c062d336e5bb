"""HiFICL's attention as the published code formulates it, written anew: what `merge_attention` is compared with.

The context is attended to by SDPA, which hides its log-sum-exp; the score matrix q K^T is therefore computed once more
in full for Z2, and autograd keeps it for the backward:

    Z2 = sum_j exp(s q.k_j),  Z1 = sum_i exp(s q.k_learn_i),  alpha = Z2 / (Z1 + Z2)
    out = alpha SDPA(q, K, V) + beta V_learn,  beta = (1 - alpha) softmax(s q K_learn^T)

Grouped keys are repeated for every query head. With `causal`, Z2 is summed over what a query sees, and the result is
that of Eq. (1). The published code has no mask there; leaving it out is a little faster, so the comparison is made
without.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from pipeline.attention.softmax import repeat
from pipeline.backbones.decoder import DecoderSpec

NAME = "hificl_published"
_TOKENS = "published_tokens"


def published_attention(
    q: Tensor, k: Tensor, v: Tensor, k_learn: Tensor, v_learn: Tensor, *, scale: float, causal: bool = False
) -> Tensor:
    """Return the attention of the formulas above, [B, H, T, d].

    Args:
        q: [B, H, T, d].
        k: [B, H_kv, T, d].
        v: like `k`.
        k_learn: [H, n, d].
        v_learn: [H, n, d].
        scale: on the scores.
        causal: whether Z2 leaves out what a query does not see.
    """
    groups = q.shape[1] // k.shape[1]
    k, v = repeat(k, groups), repeat(v, groups)
    attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    scores = torch.matmul(q, k.transpose(-1, -2)) * scale
    if causal:
        scores = scores.masked_fill(
            ~torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril(), -torch.inf
        )
    z2 = scores.exp().sum(-1, keepdim=True)
    virtual = torch.matmul(q, k_learn.to(q.dtype).transpose(-1, -2)) * scale
    z1 = virtual.exp().sum(-1, keepdim=True)
    alpha = z2 / (z1 + z2)
    return alpha * attended + (1 - alpha) * torch.matmul(virtual.softmax(-1), v_learn.to(q.dtype))


def _forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    k_learn, v_learn = (a @ b for a, b in getattr(module, _TOKENS))
    out = published_attention(query, key, value, k_learn, v_learn, scale=kwargs["scaling"])
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, _forward)
AttentionMaskInterface.register(NAME, sdpa_mask)


class Published:
    """A decoder with the published formulation in every layer, inside a `with` block.

    Args:
        spec: the decoder.
        num_virtual_tokens: n.
        rank: r of K_A K_B and V_A V_B.
    """

    def __init__(self, spec: DecoderSpec, num_virtual_tokens: int = 8, rank: int = 8) -> None:
        self.spec = spec
        device = next(spec.decoder.parameters()).device
        heads, size = spec.num_heads, spec.head_dim
        wide, narrow = (heads, num_virtual_tokens, rank), (heads, rank, size)

        def pair() -> tuple[nn.Parameter, nn.Parameter]:
            return (
                nn.Parameter(torch.randn(wide, device=device)),
                nn.Parameter(torch.randn(narrow, device=device) * 0.01),
            )

        self.tokens: Sequence[Any] = [(pair(), pair()) for _ in spec.attentions]

    def parameters(self) -> list[nn.Parameter]:
        """Return what is trained."""
        return [factor for layer in self.tokens for pair in layer for factor in pair]

    def __enter__(self) -> Published:
        self._before = self.spec.text_config._attn_implementation
        self.spec.text_config._attn_implementation = {"": NAME}
        for module, tokens in zip(self.spec.attentions, self.tokens, strict=True):
            object.__setattr__(module, _TOKENS, tokens)  # past nn.Module, which would file the parameters as its own
        return self

    def __exit__(self, *_: object) -> None:
        self.spec.text_config._attn_implementation = {"": self._before}
        for module in self.spec.attentions:
            object.__delattr__(module, _TOKENS)
