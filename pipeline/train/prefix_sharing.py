"""A trial's samples in one row of the decoder: the prefix that all begin with stands there once, and there are no pads.

    prefix | rest of sample 1 | rest of sample 2 | ...

Every token sees the prefix and what stands before it in its own sample, and has the position that it has there, so its
states are those of the sample alone. With short prompts most tokens are the task's instruction: 16 of 30 of the
miniature's, whose step of 8 then has half the tokens.

A mask says who sees what, and the mask's zeros are computed too. So a prefix is shared only where the row stays short
and saves enough; an 8B backbone's prompts, an image of 64 to 3,000 tokens behind the instruction, do not share theirs.

Shape letters: B samples, T padded length, K trials, L length of the longest shared row, D decoder width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipeline.backbones.base import placed
from pipeline.backbones.decoder import DecoderSpec
from pipeline.prompts.prompt import LEAST_SAVED

MOST_TOKENS = 256  # L; beyond it the mask costs more than the prefix
_HIDDEN = float("-inf")


def row_pays(lengths: Sequence[int], prefix: int) -> bool:
    """Whether samples of these lengths, which begin with `prefix` tokens in common, are better off in one row."""
    size = prefix + sum(length - prefix for length in lengths)
    return size <= MOST_TOKENS and size <= (1 - LEAST_SAVED) * max(lengths) * len(lengths)


@dataclass(frozen=True)
class PrefixLayout:
    """Where every token of a batch stands in the shared rows, and back.

    Attributes:
        sizes: the lengths of the shared rows without pads.
        taken: [K, L], the shared rows' tokens as places in the flattened batch, B x T; pads take place 0.
        places: [B, T], the batch's tokens as places in the flattened shared rows, K x L; pads take place 0.
        positions: [K, L], a token's position in its own sample.
        mask: [K, 1, L, L], additive: 0 where a query (third) sees a key (fourth), else -inf.
    """

    sizes: tuple[int, ...]
    taken: Tensor
    places: Tensor
    positions: Tensor
    mask: Tensor

    @classmethod
    def of(cls, lengths: Sequence[Sequence[int]], prefixes: Sequence[int], width: int, like: Tensor) -> PrefixLayout:
        """Return the layout of a batch, of whose trials each is better off so (`row_pays`).

        Args:
            lengths: for each trial the lengths of its samples; the batch has them in this order.
            prefixes: for each trial how many tokens its samples begin with in common; at least one follows.
            width: T.
            like: gives the mask's dtype and the device.
        """
        sizes = [
            prefix + sum(length - prefix for length in of_trial)
            for of_trial, prefix in zip(lengths, prefixes, strict=True)
        ]
        rows, longest = len(sizes), max(sizes)
        taken: list[int] = []
        places: list[int] = []
        positions: list[int] = []
        samples: list[int] = []
        start = 0
        for row, (of_trial, prefix) in enumerate(zip(lengths, prefixes, strict=True)):
            taken += range(start * width, start * width + prefix)
            positions += range(prefix)
            samples += [0] * prefix  # 0: the prefix, which all see
            for number, length in enumerate(of_trial):
                rest = range(len(taken), len(taken) + length - prefix)
                places += [*range(row * longest, row * longest + prefix), *rest, *[0] * (width - length)]
                taken += range((start + number) * width + prefix, (start + number) * width + length)
                positions += range(prefix, length)
                samples += [number + 1] * len(rest)
            pads = [0] * (longest - sizes[row])
            taken, positions, samples = taken + pads, positions + pads, samples + pads
            start += len(of_trial)
        shape = (rows, longest)
        owner = torch.tensor(samples).view(shape)
        seen = (owner[:, None, :] == owner[:, :, None]) | (owner[:, None, :] == 0)  # pads stand behind all that is real
        mask = torch.zeros(rows, 1, longest, longest, dtype=like.dtype).masked_fill_(~seen.tril()[:, None], _HIDDEN)
        made = [torch.tensor(x) for x in (taken, places, positions)]
        shaped = (made[0].view(shape), made[1].view(-1, width), made[2].view(shape), mask)
        return cls(tuple(sizes), *(placed(x, like.device) for x in shaped))

    def where(self, places: Tensor) -> Tensor:
        """Return where tokens of the flattened batch, B x T, stand in the flattened shared rows."""
        return self.places.flatten()[places]

    def spread(self, hidden: Tensor) -> Tensor:
        """Return states [K, L, D] as [B, T, D]; those of pads mean nothing."""
        return hidden.flatten(0, 1)[self.places]


@contextmanager
def sharing_prefix(spec: DecoderSpec, layout: PrefixLayout | None) -> Iterator[None]:
    """Let the decoder run on shared rows inside the block; what it is given and its last states are the batch's.

    Layers and whoever listens to them see the shared rows.
    """
    if layout is None:
        yield
        return

    def lay(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        name = "input_ids" if kwargs.get("inputs_embeds") is None else "inputs_embeds"  # a text decoder embeds itself
        rows = kwargs[name].flatten(0, 1)[layout.taken]
        return args, {**kwargs, name: rows, "position_ids": layout.positions, "attention_mask": layout.mask}

    def spread(module: Any, args: Any, output: Any) -> Any:
        output.last_hidden_state = layout.spread(output.last_hidden_state)
        return output

    hooks = [spec.decoder.register_forward_pre_hook(lay, with_kwargs=True), spec.decoder.register_forward_hook(spread)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
