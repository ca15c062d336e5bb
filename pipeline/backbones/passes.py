"""How many rows go through a model in one pass: what the card is thought to hold, and half of it once it did not."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from pipeline.backbones.decoder import decoder_of
from pipeline.core.errors import WorkError
from pipeline.core.progress import say

FILL = 0.85  # of what is free on the card; the rest is for the kernels' own buffers and what lies scattered
Row = TypeVar("Row")
Result = TypeVar("Result")


def is_out_of_memory(error: Exception) -> bool:
    """Whether an allocation failed: CUDA has a type for it; cuBLAS, the CPU's allocator and the loader a sentence."""
    said = ("can't allocate memory", "Cannot allocate memory", "CUBLAS_STATUS_ALLOC_FAILED", "failed to map segment")
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in said)


def free_bytes(device: torch.device) -> int | None:
    """Return what a pass may take on a card, torch's own unused blocks included; None on a CPU, which swaps."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def bytes_of_row(model: Any, tokens: int, *, new: int = 0, beams: int = 1, cached: bool = True) -> int:
    """Return about what one prompt's forward pass without a gradient takes beside the weights.

    Keys and values of L layers and H_kv heads of size d, if they are cached: 2 L H_kv d a token. One layer's
    activations: three of the width of its feed-forward net (gate, its activation, their product) and six of the hidden
    states. The mask that padding needs: T (T + new), as bool and as a bias. Logits of the last token in fp32, twice.

    Args:
        model: a transformers model, on any device.
        tokens: T, of the prompt.
        new: tokens to be generated.
        beams: of the search; each is a row.
        cached: whether keys and values are kept.
    """
    spec, size = decoder_of(model), next(model.parameters()).element_size()
    inner = getattr(spec.text_config, "intermediate_size", None) or 4 * spec.hidden_size
    inner = int(inner if isinstance(inner, int) else max(inner))  # some have one a layer
    kept = 2 * spec.num_attentions * spec.num_kv_heads * spec.head_dim * size * (tokens + new) if cached else 0
    working = (3 * inner + 6 * spec.hidden_size) * size * tokens
    mask, logits = tokens * (tokens + new) * (1 + size), 8 * int(model.get_output_embeddings().out_features)
    return beams * (kept + working + mask + logits)


@dataclass
class Passes:
    """Cuts rows into passes: no more in one than fits, and once memory has run out, than has turned out to fit.

    Attributes:
        most: of one pass, the most rows times their length, by what is done; only what ran out of memory stands here.
    """

    most: dict[str, int] = field(default_factory=dict)

    def run(
        self, doing: str, rows: Sequence[Row], work: Callable[[Sequence[Row]], Sequence[Result]], *,
        width: Callable[[Row], int] = lambda _: 1, device: torch.device | None = None,
        bytes_of: Callable[[int], int] | None = None,
    ) -> list[Result]:  # fmt: skip
        """Return what `work` gives for all rows, called with as many at once as fit; it must give one result a row.

        Args:
            doing: what it is, for `most` and for people: "generation".
            rows: in order; those of a length stand together best.
            work: does not change anything that a second call with fewer rows would miss.
            width: of a row, in tokens.
            device: where the pass runs.
            bytes_of: what a row of this many tokens takes there; None: not known before.

        Raises:
            WorkError: the memory ran out with one row.
        """
        results: list[Result] = []
        free = None if device is None or bytes_of is None else free_bytes(device)
        while len(results) < len(rows):
            rest = rows[len(results) :]
            count = self._fitting(doing, [width(row) for row in rest], free, bytes_of)
            chunk = rest[: -(-len(rest) // -(-len(rest) // count))]  # in passes of one size
            try:
                results += work(chunk)
                continue
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
            # here nothing holds on to what the pass had made, as the error's own trace does
            self.halve(doing, len(chunk), max(map(width, chunk)))
        return results

    def _fitting(
        self, doing: str, widths: Sequence[int], free: int | None, bytes_of: Callable[[int], int] | None
    ) -> int:
        most, widest = self.most.get(doing), 0
        for count, width in enumerate(widths, 1):
            widest = max(widest, width)
            known = most is not None and count * widest > most
            if count > 1 and (known or (free is not None and bytes_of and count * bytes_of(widest) > FILL * free)):
                return count - 1
        return len(widths)

    def halve(self, doing: str, rows: int, width: int = 1, *, where: str = "") -> None:
        """Note that a pass ran out of memory, and free what torch keeps; from now on half as many rows go at once.

        Raises:
            WorkError: there is nothing to halve.
        """
        if rows == 1:
            raise WorkError(
                f"one sample alone does not fit the memory, in {doing}",
                where=where,
                way_out="Use a larger device, fewer demonstrations, a lower train.precision, or "
                "train.gradient_checkpointing; `hificl plan --memory` says what fits which card",
            )
        left = -(-rows // 2)
        self.most[doing] = left * width
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        say(f"out of memory in {doing} with {rows} rows in one pass: from now on at most {left}; nothing is lost")
