"""Prefix, prompt and context tuning: what every layer attends to besides, learned as such or as input embeddings."""

from __future__ import annotations

import inspect
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import Field
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from pipeline.adapters.base import METHODS, AttentionAdapter, Init, Prefill, Shown
from pipeline.adapters.options import Facts, Options, TeacherOptions
from pipeline.backbones.base import gathered
from pipeline.backbones.decoder import DecoderSpec
from pipeline.core.errors import InputError

_KEY_STD = 0.02


class PrefixOptions(TeacherOptions):
    """How many tokens stand before the context."""

    num_virtual_tokens: int = Field(default=8, ge=1)

    def facts(self) -> Facts:
        """Cross-entropy alone, or with a teacher."""
        return self.taught(Facts())


class CTKVOptions(TeacherOptions):
    """How many of the demonstrations' tokens are kept, the last ones."""

    num_virtual_tokens: int | None = Field(default=None, ge=1)  # None: all

    def facts(self) -> Facts:
        """Cross-entropy alone, or with a teacher; it starts from demonstrations."""
        return self.taught(Facts(learning_rate=1e-3, starts=True))


class _Before(AttentionAdapter):
    """Virtual tokens of the key heads, which a group of query heads shares as it shares the context's."""

    def __init__(self, options: Options, spec: DecoderSpec, init: Init) -> None:
        super().__init__(options, spec, init)
        self.groups = spec.num_heads // spec.num_kv_heads

    def _of_heads(self, keys: Tensor, values: Tensor) -> dict[str, Tensor]:
        return {"keys": keys.repeat_interleave(self.groups, 1), "values": values.repeat_interleave(self.groups, 1)}


@METHODS.register
class Prefix(_Before):
    """Free keys and values before every layer's context (prefix tuning, Li and Liang 2021, arXiv 2101.00190).

    out = softmax(s q [P_K ; K]^T) [P_V ; V], P_K and P_V [n, d] for every layer and key head, trained directly, without
    the paper's net behind them. A cached key at position 0 does not depend on the query's position: neither do these.
    P_K ~ N(0, 0.02^2), P_V = 0. Trainable: 2 H_kv L n d.
    """

    name = "prefix"
    Options: ClassVar[type[Options]] = PrefixOptions

    def __init__(self, options: PrefixOptions | CTKVOptions, spec: DecoderSpec, init: Init) -> None:
        super().__init__(options, spec, init)
        shape = (spec.num_attentions, spec.num_kv_heads, options.num_virtual_tokens or 1, spec.head_dim)
        self.keys, self.values = init.normal(*shape, std=_KEY_STD), init.full(*shape)

    def forward(self) -> dict[str, Tensor]:
        """Return all layers' virtual tokens."""
        return self._of_heads(self.keys, self.values)


@METHODS.register
class CTKV(Prefix):
    """A prefix that starts as the keys and values of demonstrations (CT-KV, Lu et al. 2025, arXiv 2507.04221).

    out = softmax(s q [P_K ; K]^T) [P_V ; V]. P_K and P_V start as what the frozen decoder caches of one prompt of
    `num_shots` demonstrations of the training split, drawn once by the trial's seed, at the positions -n to -1: the
    first step sees in-context learning. All its tokens are kept, or the last `num_virtual_tokens`. The paper's token
    dropout, and its mask that hides a demonstration from itself, are no part of it. Until it has seen demonstrations it
    is prefix tuning, with one token where all are to be kept. Trainable: 2 H_kv L n d.
    """

    name = "ct-kv"
    Options: ClassVar[type[Options]] = CTKVOptions
    options: CTKVOptions

    @torch.no_grad()
    def start(self, shown: Shown) -> None:
        """Take the demonstrations' keys and values."""
        keys, values = shown.cache()
        self.expect(keys.shape[2])
        for learnt, seen in ((self.keys, keys), (self.values, values)):
            learnt.copy_(seen[:, :, -learnt.shape[2] :])

    def expect(self, tokens: int) -> None:
        """Hold as many tokens as demonstrations of so many leave."""
        self._hold(min(tokens, self.options.num_virtual_tokens or tokens))

    def check_weights(self, path: Path) -> None:
        """Hold as many tokens as the file has, then compare the rest."""
        with suppress(OSError, SafetensorError), safe_open(path, framework="pt") as file:
            shape = file.get_slice("keys").get_shape()
            if len(shape) == self.keys.dim() and shape[2]:
                self._hold(shape[2])
        super().check_weights(path)

    def _hold(self, tokens: int) -> None:
        for name in ("keys", "values"):
            before = getattr(self, name)
            setattr(self, name, nn.Parameter(before.new_zeros((*before.shape[:2], tokens, before.shape[3]))))


@METHODS.register
class Prompt(_Before):
    """Soft tokens before the prompt: input embeddings P [n, D] (prompt tuning, Lester et al. 2021, arXiv 2104.08691).

    The decoder on [P ; E(x)]. Nothing that follows changes what the decoder makes of P, so it runs on P alone, at the
    positions -n to -1, and its keys and values are what the prompt attends to besides: to the number the same, with the
    prompt's own positions as they are. P starts as embeddings of tokens drawn from the vocabulary. Trainable: n D.
    """

    name = "prompt"
    Options: ClassVar[type[Options]] = PrefixOptions
    prefills = True

    def __init__(self, options: PrefixOptions, spec: DecoderSpec, init: Init, embeddings: Tensor) -> None:
        super().__init__(options, spec, init)
        self.prompt = init.place(lambda: embeddings, embeddings.shape)

    @classmethod
    def build(cls, model: nn.Module, spec: DecoderSpec, options: Any, seed: int, device: torch.device) -> Prompt:
        """Draw the tokens that the prompt starts as."""
        if "pixel_values" in inspect.signature(spec.decoder.forward).parameters:
            problem = f"the decoder of {spec.model_type} looks at pictures in its layers, and runs no soft prompt alone"
            raise InputError(problem, where=f"method '{cls.name}'", way_out="Use the method prefix")
        init, table = Init(seed, device), model.get_input_embeddings()  # type: ignore[operator]
        with torch.no_grad(), gathered(table):
            drawn = torch.randint(len(table.weight), (options.num_virtual_tokens,), generator=init.generator)
            return cls(options, spec, init, table(drawn.to(table.weight.device)).float())

    @property
    def num_virtual(self) -> int:
        """How many soft tokens there are."""
        return len(self.prompt)

    def forward(self, prefill: Prefill | None = None) -> dict[str, Tensor]:
        """Return what every layer makes of the soft tokens, which `prefill` runs through the decoder."""
        if prefill is None:
            raise InputError("a soft prompt is nothing without a decoder", where=f"method '{self.name}'")
        return self._of_heads(*prefill(self.prompt))
