"""How passes run: as many rows at once as the card holds, half of it once it did not; a token's as a CUDA graph.

A decoded token costs a GPU less than the host needs to launch its two thousand kernels. Recorded once, they are
launched by one call. What is recorded reads and writes the same memory each time, so inputs are copied to where they
stood.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

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


def bytes_of_row(model: Any, tokens: int, *, new: int = 0, beams: int = 1, caches: int = 1) -> int:
    """Return about what one prompt's forward pass without a gradient takes beside the weights.

    Keys and values of L layers and H_kv heads of size d, as often as they are cached: 2 L H_kv d a token. One layer's
    activations: three of the width of its feed-forward net (gate, its activation, their product) and six of the hidden
    states. The mask that padding needs: T (T + new), as bool and as a bias. Logits of the last token in fp32, twice.

    Args:
        model: a transformers model, on any device.
        tokens: T, of the prompt.
        new: tokens to be generated.
        beams: of the search; each is a row.
        caches: how often keys and values are kept.
    """
    spec = decoder_of(model)
    size = next(parameter.itemsize for parameter in model.parameters() if parameter.is_floating_point())
    inner = getattr(spec.text_config, "intermediate_size", None) or 4 * spec.hidden_size
    inner = int(inner if isinstance(inner, int) else max(inner))  # some have one a layer
    kept = caches * 2 * spec.num_attentions * spec.num_kv_heads * spec.head_dim * size * (tokens + new)
    working = (3 * inner + 6 * spec.hidden_size) * size * tokens
    mask, logits = tokens * (tokens + new) * (1 + size), 8 * int(model.get_output_embeddings().out_features)
    return beams * (kept + working + mask + logits)


def of_all_ranks(value: Result) -> list[Result]:
    """Return every rank's value, in the order of ranks; that of this process where it is alone."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


@dataclass
class Passes:
    """Cuts rows into passes: no more in one than fits, and once memory has run out, than has turned out to fit.

    Attributes:
        most: of one pass, the most rows times their length, by what is done; only what ran out of memory stands here.
        together: whether ranks have the model's parameters in parts (ZeRO-3). A module's parameters are then brought
            together from all ranks whenever it is called, so all must make the same passes, with rows of their own.
    """

    most: dict[str, int] = field(default_factory=dict)
    together: bool = False

    def of_ranks(self, value: Result) -> list[Result]:
        """Return the values of all ranks that make their passes together, in order; every one of them asks."""
        return of_all_ranks(value) if self.together else [value]

    def run(
        self, doing: str, rows: Sequence[Row], work: Callable[[Sequence[Row]], Sequence[Result]], *,
        width: Callable[[Row], int] = lambda _: 1, device: torch.device | None = None,
        bytes_of: Callable[[int], int] | None = None,
    ) -> list[Result]:  # fmt: skip
        """Return what `work` gives for all rows, called with as many at once as fit; it must give one result a row.

        Ranks whose passes go together (`together`) all make as many as the one that needs most.

        Args:
            doing: what it is, for `most` and for people: "generation".
            rows: in order; those of a length stand together best. Where a rank has some, every rank has.
            work: does not change anything that a second call with fewer rows would miss.
            width: of a row, in tokens.
            device: where the pass runs.
            bytes_of: what a row of this many tokens takes there; None: not known before.

        Raises:
            WorkError: the memory ran out with one row, or in a pass that other ranks are in the midst of.
        """
        results: list[Result] = []
        free = None if device is None or bytes_of is None else free_bytes(device)
        while True:
            rest = rows[len(results) :]
            count = self._fitting(doing, [width(row) for row in rest], free, bytes_of)
            passes = max(self.of_ranks(-(-len(rest) // count) if rest else 0))
            if not passes:
                return results
            chunk = rest[: -(-len(rest) // passes)]  # in passes of one size
            try:
                results += work(chunk) if chunk else work(rows[-1:])[:0]  # others are not done yet
                continue
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                if self.together:
                    way_out = "Lower train.micro_batch_size or num_shots, or set train.zero_stage to 2"
                    raise WorkError(f"the memory ran out in {doing}, at ZeRO-3", way_out=way_out) from None
            # here nothing holds on to what the pass had made, as the error's own trace does
            self.halve(doing, len(chunk), max(map(width, chunk)))

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


GRAPHS_ON = "cuda"  # the type of device whose passes are recorded
_SAME = 0.05  # relative distance of what is replayed to what was computed; rounding gives less than 0.01
_COMPARED = (2, 4, 8)  # batches whose first token by a recorded pass is compared too


def record(work: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """Run `work` while its launches are recorded; return what launches them again, and where the result then stands.

    Args:
        work: asks the device nothing, and reads nothing from the host.

    Raises:
        RuntimeError: it cannot be recorded.
    """
    graph, cause = torch.cuda.CUDAGraph(), None
    try:
        # of this thread alone: others load pictures meanwhile
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            try:
                result = work()
            except Exception as error:
                cause = error  # which the end of a recording that has failed hides
                raise
    except RuntimeError as error:
        value = torch.zeros(1, device="cuda")  # until a recording succeeds, the device draws no random numbers
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            value.add_(1)
        raise cause or error from None
    return graph.replay, result


def warmed(work: Callable[[], Tensor]) -> Tensor:
    """Run `work` where recording will run it, and return its result: kernels are compiled and chosen in it."""
    if not torch.cuda.is_available():
        return work()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        result = work()
    torch.cuda.current_stream().wait_stream(stream)
    return result


class TokenPass:
    """One decoded token of every row, recorded.

    Args:
        model: the backbone, with whatever is attached.
        never: tokens that are not written.
        cache: of the prompts of the first batch, for the shapes of its layers.
        key: rows, width of the cache, what is attached.
        held: what a recorded pass reads besides, and must not lose.

    Attributes:
        newest: the token [B, 1] that was written last.
    """

    def __init__(
        self, model: Any, never: Sequence[int], cache: Any, key: tuple[int, int, Hashable], held: object
    ) -> None:
        from transformers.cache_utils import Cache

        self.model, self.key, self.held, self.uses = model, key, held, 0
        rows, width, _ = key
        device = cache.layers[0].keys.device
        self.newest = torch.zeros(rows, 1, dtype=torch.long, device=device)
        self.position, self.place = torch.zeros_like(self.newest), torch.zeros(1, dtype=torch.long, device=device)
        self.seen = torch.zeros(rows, 1, 1, width, dtype=torch.bool, device=device)
        self.never = torch.tensor(never, dtype=torch.long).to(device)
        self.cache = Cache(layers=[_fixed_layer()(layer, self.place, width) for layer in cache.layers])
        self._replay: Callable[[], None] | None = None

    def begin(self, cache: Any, logits: Tensor, mask: Tensor, positions: Tensor) -> None:
        """Take in what a batch's prompts gave: their cache, which is emptied, and the logits of the first token."""
        length = mask.shape[1]
        for fixed, layer in zip(self.cache.layers, cache.layers, strict=True):
            fixed.keys[:, :, :length], fixed.values[:, :, :length] = layer.keys, layer.values
            layer.keys = layer.values = None
        self.newest.copy_(self._best(logits))
        self.position.copy_(positions[:, -1:] + 1)
        self.place.fill_(length)
        self.seen.zero_()
        self.seen[:, 0, 0, :length] = mask.bool()
        self.uses += 1
        if self._replay is None or self.uses in _COMPARED:
            self._try()

    def _try(self) -> None:
        """Record the pass where it is not, and compare it with the computed one; all is then as it was.

        Raises:
            RuntimeError: it cannot be recorded, or gives something else.
        """
        state = [self.newest, self.position, self.place, self.seen]
        before = [x.clone() for x in state]

        def back() -> None:
            for x, value in zip(state, before, strict=True):
                x.copy_(value)

        def anew() -> Tensor:
            back()
            return self._compute()

        wanted = warmed(anew).clone()
        if self._replay is None:
            self._replay, self._logits = record(self._compute)
        back()
        self._replay()
        distance, size = float((self._logits - wanted).float().norm()), float(wanted.float().norm())
        if not distance <= _SAME * size:
            raise RuntimeError(f"a recorded pass is {distance:.2g} off, of {size:.2g}")
        back()

    def replay(self) -> None:
        """Write a token of every row.

        Raises:
            WorkError: nothing was begun.
        """
        if self._replay is None:
            raise WorkError("no pass was recorded")
        self._replay()

    def _compute(self) -> Tensor:
        self.seen.index_fill_(3, self.place, True)
        logits = self.model(
            input_ids=self.newest, attention_mask=self.seen, position_ids=self.position, past_key_values=self.cache,
            use_cache=True, logits_to_keep=1,
        ).logits  # fmt: skip
        self.newest.copy_(self._best(logits))
        self.position.add_(1)
        self.place.add_(1)
        return logits

    def _best(self, logits: Tensor) -> Tensor:
        return logits[:, -1].index_fill(1, self.never, float("-inf")).argmax(-1, keepdim=True)


@cache
def _fixed_layer() -> Any:
    """Return the layer of a cache of fixed width; to import transformers takes seconds."""
    from transformers.cache_utils import CacheLayerMixin

    class FixedLayer(CacheLayerMixin):
        """Keys and values [B, H_kv, width, d], of which a mask says what is there."""

        is_sliding = False

        def __init__(self, like: Any, place: Tensor, width: int) -> None:
            super().__init__()
            for name in ("keys", "values"):
                shape = getattr(like, name).shape
                setattr(self, name, getattr(like, name).new_zeros(*shape[:2], width, shape[-1]))
            self.place, self.is_initialized = place, True

        def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            self.keys.index_copy_(2, self.place, keys)
            self.values.index_copy_(2, self.place, values)
            return self.keys, self.values

        def lazy_initialization(self, keys: Tensor, values: Tensor) -> None:
            """It is made whole."""

        def get_seq_length(self) -> int:
            return 0  # so that what is attached is computed in the pass itself, where the parameters are read

        def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
            return self.keys.shape[2], 0

        def get_max_length(self) -> int:
            return self.keys.shape[2]

    return FixedLayer
