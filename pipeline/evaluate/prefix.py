"""The common head of one call's prompts: demonstrations that are the same for every query are computed once.

The keys and values of the common head are kept and given to every batch; its rows are then the queries alone. A causal
decoder's states of the head do not depend on what follows, so the answers are those of the whole prompts.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from pipeline.backbones.load import Loaded
from pipeline.prompts.collate import Batch, collate
from pipeline.prompts.prompt import Encoded

if TYPE_CHECKING:
    from pathlib import Path

    from pipeline.resident.visual_tokens import VisualTokens


def common_head(requests: Sequence[Encoded]) -> Encoded | None:
    """Return what stands before the query in every request, if it is one and the same and holds an image.

    An instruction alone is not worth a pass of its own.
    """
    if len(requests) < 2 or not requests[0].query_image:
        return None
    first = requests[0]
    tokens, images = first.input_ids[: first.query_start], first.images[: first.query_image]
    for request in requests:
        same = request.query_start == len(tokens) and request.query_image == len(images)
        if not same or request.input_ids[: len(tokens)] != tokens or request.images[: len(images)] != images:
            return None
    return Encoded(tokens, images, 0, None, first.sample_id)


def without_head(request: Encoded) -> Encoded:
    """Return the query's own turn of a request."""
    start = request.query_start
    return replace(
        request, input_ids=request.input_ids[start:], images=request.images[request.query_image :], query_start=0,
        query_image=0,
    )  # fmt: skip


@dataclass(frozen=True)
class Prefix:
    """The keys and values of a common head.

    Attributes:
        tokens: the head's token ids.
        cache: its keys and values, of one row.
    """

    tokens: tuple[int, ...]
    cache: Any

    @classmethod
    @torch.no_grad()
    def of(cls, head: Encoded, loaded: Loaded, visual_tokens: VisualTokens, root: Path | str) -> Prefix:
        """Run the head through the model, with whatever is attached to it."""
        batch = collate([head], loaded, visual=visual_tokens.get(list(head.images), root)).to(loaded.device)
        out = loaded.model.model(**batch.model_inputs(loaded), use_cache=True)
        return cls(head.input_ids, out.past_key_values)

    def before(self, batch: Batch, loaded: Loaded) -> dict[str, Any]:
        """Return `generate`'s arguments for a left-padded batch of queries behind the head.

        The pads of a row stand between the head and the query; the mask hides them, and positions go on from the head.
        """
        rows, length = len(batch), len(self.tokens)
        head = torch.tensor(self.tokens, device=batch.input_ids.device).expand(rows, length)
        inputs = batch.model_inputs(loaded)
        cache = copy.deepcopy(self.cache)
        cache.batch_repeat_interleave(rows)
        inputs["past_key_values"] = cache
        inputs["input_ids"] = torch.cat([head, batch.input_ids], dim=1)
        inputs["attention_mask"] = torch.cat([torch.ones_like(head), inputs["attention_mask"]], dim=1)
        counted = torch.arange(length, device=head.device).expand(rows, length)
        inputs["position_ids"] = torch.cat([counted, inputs["position_ids"] + length], dim=1)
        return inputs
