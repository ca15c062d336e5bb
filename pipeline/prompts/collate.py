"""`Batch`: encoded prompts of one size, with what the model sees of their images.

For training rows are padded on the right: a causal decoder's real positions never see a pad, so no attention mask is
needed. For generation they are padded on the left, with a mask and positions.

Shape letters: B rows, T padded length, N images of the batch, V visual tokens of an image, D decoder width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from pipeline.backbones.base import placed
from pipeline.backbones.load import Loaded
from pipeline.prompts.prompt import Encoded

TrainedSpan = Literal["answer", "sequence"]
_HOSTS = ("labels", "lengths")  # what the host asks about: on a GPU each answer would wait for it
IGNORED = -100  # the label that cross-entropy leaves out


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows of one forward pass.

    Attributes:
        input_ids: [B, T] int64.
        labels: [B, T] int64, the token ids themselves at the places that are trained, -100 elsewhere. Not shifted:
            the logits at t - 1 predict the label at t. On the CPU: how many there are decides shapes.
        lengths: [B] int64, real tokens of a row. On the CPU.
        position_ids: [B, T] int64, counted from a row's first real token.
        attention_mask: [B, T] int64 where rows are padded on the left, None on the right.
        sample_ids: of the rows' queries.
        image_counts: how many images each row has.
        visual: N tensors [V, D] of visual tokens computed before, or None.
        pixels: the model's pixel arguments, or None.
    """

    input_ids: Tensor
    labels: Tensor
    lengths: Tensor
    position_ids: Tensor
    attention_mask: Tensor | None
    sample_ids: tuple[int | str, ...]
    image_counts: tuple[int, ...]
    visual: tuple[Tensor, ...] | None = None
    pixels: Mapping[str, Tensor] | None = None

    def __len__(self) -> int:
        return len(self.sample_ids)

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch with every tensor on `device` that the model is given."""
        moved: dict[str, Any] = {
            name: placed(value, device)
            for name in self.__slots__
            if name not in _HOSTS and isinstance(value := getattr(self, name), Tensor)
        }
        visual = None if self.visual is None else tuple(placed(v, device) for v in self.visual)
        pixels = None if self.pixels is None else {k: placed(v, device) for k, v in self.pixels.items()}
        return replace(self, **moved, visual=visual, pixels=pixels)

    def model_inputs(self, loaded: Loaded) -> dict[str, Any]:
        """Return the arguments of the model's forward or `generate`, labels left out.

        A fresh mapping for each call: transformers changes what it is given.
        """
        inputs: dict[str, Any] = {"input_ids": self.input_ids}
        if self.attention_mask is not None:
            inputs |= {"attention_mask": self.attention_mask, "position_ids": self.position_ids}
        inputs |= loaded.family.image_arguments(
            visual=self.visual, pixels=self.pixels, input_ids=self.input_ids, image_counts=self.image_counts,
            image_token_id=loaded.image_token_id,
        )  # fmt: skip
        return {name: value for name, value in inputs.items() if value is not None}


def collate(
    encoded: Sequence[Encoded],
    loaded: Loaded,
    *,
    span: TrainedSpan | Sequence[TrainedSpan] = "answer",
    side: Literal["right", "left"] = "right",
    visual: Sequence[Tensor] | None = None,
    pixels: Mapping[str, Tensor] | None = None,
) -> Batch:
    """Return a batch of encoded prompts.

    Args:
        encoded: the rows.
        loaded: the backbone in use; its pad token fills rows up.
        span: which tokens are trained: the answer (HiFICL Eq. 4), or all of the query's turn and answer but the
            image tokens, as the published code does; one for all rows, or one a row.
        side: `right` for training, `left` for generation.
        visual: visual tokens [V, D] of all rows' images, in order.
        pixels: or the model's pixel arguments for all rows.
    """
    rows, width = len(encoded), max(len(e) for e in encoded)
    input_ids = torch.full((rows, width), loaded.tokenizer.pad_token_id, dtype=torch.long)
    labels = torch.full((rows, width), IGNORED, dtype=torch.long)
    lengths = torch.tensor([len(e) for e in encoded])
    shifts = [width - len(e) if side == "left" else 0 for e in encoded]
    spans_of = [span] * rows if isinstance(span, str) else list(span)
    for row, (e, shift) in enumerate(zip(encoded, shifts, strict=True)):
        ids = torch.tensor(e.input_ids)
        input_ids[row, shift : shift + len(e)] = ids
        start, end = e.answer_span or (len(e), len(e))
        first = start if spans_of[row] == "answer" else e.query_start
        labels[row, shift + first : shift + end] = ids[first:end]
    labels[torch.isin(input_ids, torch.tensor(loaded.never_generated))] = IGNORED
    shift_column = torch.tensor(shifts)[:, None]
    positions = (torch.arange(width)[None] - shift_column).clamp(min=0)
    mask = (torch.arange(width)[None] >= shift_column).long() if side == "left" else None
    return Batch(
        input_ids=input_ids,
        labels=labels,
        lengths=lengths,
        position_ids=positions,
        attention_mask=mask,
        sample_ids=tuple(e.sample_id for e in encoded),
        image_counts=tuple(len(e.images) for e in encoded),
        visual=None if visual is None else tuple(visual),
        pixels=pixels,
    )
