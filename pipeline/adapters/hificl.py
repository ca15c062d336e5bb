"""HiFICL: low-rank virtual key-value pairs inside every head's softmax, in one set or in several with a router."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn

from pipeline.adapters.base import METHODS, AttentionAdapter, Init
from pipeline.adapters.options import Facts, Options, PublishedDecoding, TeacherOptions
from pipeline.attention.softmax import no_autocast
from pipeline.backbones.decoder import DecoderSpec

_KEY_STD, _ROUTER_STD = 0.01, 0.02
_QUIET = 4.0  # alpha_init "identity": the virtual tokens start with Z1 of about exp(-4) in all


class HiFICLOptions(TeacherOptions):
    """HiFICL's options; the four after `rank` are Table 2's ablations.

    `heads: kv` gives the query heads of a group the same virtual tokens: what a key head of grouped attention can hold.
    """

    unwritten: ClassVar[Mapping[str, Any]] = {"heads": "query"}
    published_decoding: ClassVar[PublishedDecoding] = PublishedDecoding(
        num_beams=1, length_penalty=1.0, max_new_tokens=20
    )
    num_virtual_tokens: int = Field(default=8, ge=1)
    rank: int = Field(default=8, ge=1)
    lowrank_k: bool = True
    lowrank_v: bool = True
    alpha: Literal["full", "one"] = "full"
    alpha_init: Literal["paper", "identity"] = "paper"
    heads: Literal["query", "kv"] = "query"

    def facts(self) -> Facts:
        """Cross-entropy alone (Eq. 4); with a teacher, MimIC's alignment and half of it."""
        return self.taught(Facts())


@METHODS.register
class HiFICL(AttentionAdapter):
    """Virtual tokens K_learn = K_A K_B, V_learn = V_A V_B in each head's softmax (HiFICL Eq. 1 and 3).

    out = alpha SA(q) + beta V_learn, alpha = Z2 / (Z1 + Z2), beta_i = exp(s q.k_learn_i) / (Z1 + Z2).
    K_A, V_A ~ N(0, 1), K_B ~ N(0, 0.01^2), V_B = 0: at the start the value shift is zero, but alpha is not 1, for
    K_learn of about 0 gives Z1 of about n, so the base output is scaled down. That is the paper's equation and the
    published code. `alpha_init="identity"` lowers the virtual logits by a constant log n + 4 instead.
    Trainable: H L 2 r (n + d); 2,228,224 for 32 layers of 32 heads of 128 with n = r = 8. With `heads: kv` H counts
    the key heads, and a group of query heads shares its tokens.
    """

    name = "hificl"
    Options: ClassVar[type[Options]] = HiFICLOptions
    options: HiFICLOptions

    def __init__(self, options: HiFICLOptions, spec: DecoderSpec, init: Init, sets: tuple[int, ...] = ()) -> None:
        super().__init__(options, spec, init)
        n, r = options.num_virtual_tokens, options.rank
        heads = spec.num_heads if options.heads == "query" else spec.num_kv_heads
        grid, size, self.groups = (spec.num_attentions, heads, *sets), spec.head_dim, spec.num_heads // heads
        self.replaces = options.alpha == "full"
        if options.lowrank_k:
            self.k_a = init.normal(*grid, n, r, std=1.0)
            self.k_b = init.normal(*grid, r, size, std=_KEY_STD)
        else:  # of the spread that the product has
            self.k = init.normal(*grid, n, size, std=_KEY_STD * math.sqrt(r))
        if options.lowrank_v:
            self.v_a = init.normal(*grid, n, r, std=1.0)
            self.v_b = init.full(*grid, r, size)
        else:
            self.v = init.full(*grid, n, size)

    def forward(self) -> dict[str, Tensor]:
        """Return all layers' virtual keys and values, one product each."""
        with no_autocast(self._first()):
            tokens = {
                "keys": self.k_a @ self.k_b if self.options.lowrank_k else self.k,
                "values": self.v_a @ self.v_b if self.options.lowrank_v else self.v,
            }
        tokens = {name: x.flatten(2, -2) for name, x in tokens.items()}  # of sets, one behind another
        if self.groups > 1:
            tokens = {name: x.repeat_interleave(self.groups, 1) for name, x in tokens.items()}
        if self.options.alpha_init == "identity":
            keys = tokens["keys"]
            tokens["bias"] = keys.new_full(keys.shape[:3], -math.log(self.options.num_virtual_tokens) - _QUIET)
        return tokens

    def _first(self) -> nn.Parameter:
        return next(self.parameters())


class MoEHiFICLOptions(HiFICLOptions):
    """HiFICL's options, for each set, and how many sets there are."""

    experts: int = Field(default=4, ge=1)


@METHODS.register
class MoEHiFICL(HiFICL):
    """Several sets of HiFICL's virtual tokens, mixed by a router on the query (MoE-HiFICL, HiFICL Sec. 8.1).

    out = alpha SA(q) + sum_e sum_i beta_ei v_ei, beta_ei = g_e(q) exp(s q.k_ei) / (Z1 + Z2), alpha = Z2 / (Z1 + Z2),
    Z1 = sum_e g_e(q) sum_i exp(s q.k_ei), g(q) = softmax_e(w_e.q) for every head and position. The paper names the
    method as its future work, "dynamically route to multiple virtual key-value pairs", and gives no equation: this is
    its Eq. 1 with a soft mixture of sets, whose Z1 starts at about n as HiFICL's. w ~ N(0, 0.02^2); sets start as
    HiFICL's. Trainable: E H L 2 r (n + d) + E H L d.
    """

    name = "moe-hificl"
    Options: ClassVar[type[Options]] = MoEHiFICLOptions
    routes = True
    options: MoEHiFICLOptions

    def __init__(self, options: MoEHiFICLOptions, spec: DecoderSpec, init: Init) -> None:
        super().__init__(options, spec, init, (options.experts,))
        heads = spec.num_heads // self.groups
        self.router = init.normal(spec.num_attentions, heads, options.experts, spec.head_dim, std=_ROUTER_STD)

    def forward(self) -> dict[str, Tensor]:
        """Return all layers' virtual tokens, and each token's own row of the router, w_e.

        A softmax over tokens counts each of the sets n times: the n is given back as a logit.
        """
        tokens, n = super().forward(), self.options.num_virtual_tokens
        tokens["router"] = self.router.repeat_interleave(n, 2).repeat_interleave(self.groups, 1)
        keys = tokens["keys"]
        tokens["bias"] = tokens.get("bias", keys.new_zeros(keys.shape[:3])) + math.log(n)
        return tokens
