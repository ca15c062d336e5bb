"""How passes run: as many rows at once as the card holds, half of it once it did not; and as recorded CUDA graphs.

A short pass costs a GPU less than the host needs to launch its two thousand kernels. Recorded once, they are launched
by one call. What is recorded reads and writes the same memory each time, so inputs are copied to where they stood.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from pipeline.backbones.decoder import DecoderSpec, decoder_of
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
_WIDTHS = 16  # tokens: a batch is padded to the next multiple, so that few lengths are recorded
_SAME = 0.05  # relative distance of what is replayed to what was computed; rounding gives less than 0.01
COMPARED = (2, 4, 8)  # uses of a recorded pass that are compared once more: parameters have changed by then
_WARM = 2  # passes before recording: kernels are compiled and chosen in them


def record(work: Callable[[], Sequence[Tensor | None]], pool: Any) -> tuple[Callable[[], None], list[Tensor | None]]:
    """Run `work` while its launches are recorded; return what launches them again, and where the results then stand.

    Args:
        work: asks the device nothing, and reads nothing from the host.
        pool: memory for what it makes on the way, shared by graphs of which one is used up before the next is launched.

    Raises:
        RuntimeError: it cannot be recorded.
    """
    graph, pool, cause = torch.cuda.CUDAGraph(), pool or torch.cuda.graph_pool_handle(), None
    try:
        # of this thread alone: others load pictures meanwhile
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            try:
                made = list(work())
            except Exception as error:
                cause = error  # which the end of a recording that has failed hides
                raise
    except RuntimeError as error:
        _forgotten(pool)
        raise cause or error from None
    return graph.replay, made


def _forgotten(pool: Any) -> None:
    """Undo what a failed recording leaves: what is freed stays in its pool, and the device draws no random numbers."""
    with suppress(RuntimeError, AttributeError):  # it was told already, or is of another torch
        torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
    torch.cuda.empty_cache()
    value, graph = torch.zeros(1, device="cuda"), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        value.add_(1)


def warmed(work: Callable[[], Any], times: int = _WARM) -> Any:
    """Run `work` a few times where recording will run it, and return its last result.

    Raises:
        RuntimeError: it waits for the device, which cannot be recorded; a recording would fail and leave damage.
    """
    if not torch.cuda.is_available():
        return work()
    stream, mode = torch.cuda.Stream(), torch.cuda.get_sync_debug_mode()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(times - 1):  # what is made once may wait
            work()
        torch.cuda.set_sync_debug_mode("error")
        try:
            made = work()
        finally:
            torch.cuda.set_sync_debug_mode(mode)
    torch.cuda.current_stream().wait_stream(stream)
    return made


def compare(made: Sequence[Tensor | None], wanted: Sequence[Tensor | None]) -> None:
    """Compare what is replayed with what is computed.

    Raises:
        RuntimeError: it is something else.
    """
    pairs = [(x.float(), y.float()) for x, y in zip(made, wanted, strict=True) if x is not None and y is not None]
    distance = float(torch.stack([(x.detach() - y.detach()).norm() for x, y in pairs]).norm())
    size = float(torch.stack([y.detach().norm() for _, y in pairs]).norm())
    if not distance <= _SAME * size:
        raise RuntimeError(f"a recorded pass is {distance:.2g} off, of {size:.2g}")


def given_up(error: Exception, what: str) -> None:
    """Say why a pass is not recorded, and go on without."""
    text = str(error).strip().splitlines() or [""]
    warnings.warn(f"{what} runs without CUDA graphs: {type(error).__name__}: {text[0]}", stacklevel=2)


class RecordedDecoder:
    """The decoder's forward and backward pass in training, recorded for each shape that comes.

    Stands in the place of the decoder's `forward` (`recorded_passes`). Rows are padded on the right, which a causal
    decoder does not see. A recorded pass is compared with the computed one, output and gradients, when it is recorded,
    and its output at three uses behind it; where it differs, or cannot be recorded, one warning says so and the decoder
    computes as ever. Its memory is given back with it.

    Args:
        spec: the decoder.
        adapters: what is trained.
        state: what else a recorded pass holds on to, as a key, and the tensors that it reads.
    """

    def __init__(
        self, spec: DecoderSpec, adapters: Sequence[nn.Module], state: Callable[[], tuple[Hashable, object]]
    ) -> None:
        self.spec, self.roots, self.state = spec, list(adapters), state
        self.parameters = [x for adapter in adapters for x in adapter.parameters() if x.requires_grad]
        self.recorded: dict[Hashable, _RecordedPass] = {}
        self.pool = torch.cuda.graph_pool_handle() if torch.cuda.is_available() else None
        self.compute: Any = type(spec.decoder).forward
        self.is_off = False

    def forward(self, *args: Any, inputs_embeds: Any = None, position_ids: Any = None, **others: Any) -> Any:
        """Compute what the decoder's own `forward` does, by a recorded pass where there may be one."""
        asked = {name for name, value in others.items() if value is not None and value is not False}
        plain = self.is_off or bool(args) or inputs_embeds is None or not asked <= {"return_dict"}
        if plain or not torch.is_grad_enabled() or torch.is_autocast_enabled(inputs_embeds.device.type):
            given = {"inputs_embeds": inputs_embeds, "position_ids": position_ids, **others}
            return self.compute(self.spec.decoder, *args, **{k: v for k, v in given.items() if v is not None})
        from transformers.modeling_outputs import BaseModelOutputWithPast

        return BaseModelOutputWithPast(last_hidden_state=self._hidden(inputs_embeds, position_ids))

    def _hidden(self, embeds: Tensor, positions: Tensor | None) -> Tensor:
        rows, length, _ = embeds.shape
        if positions is None:
            positions = torch.arange(length, device=embeds.device)[None]
        missing = -length % _WIDTHS
        wide = torch.nn.functional.pad(embeds, (0, 0, 0, missing))
        behind = positions[:, -1:] + torch.arange(1, missing + 1, device=positions.device)
        places = torch.cat([positions, behind], 1)
        state, held = self.state()
        addresses = tuple(parameter.data_ptr() for parameter in self.parameters)
        key = (rows, length + missing, positions.shape, embeds.requires_grad, addresses, state)
        try:
            if key not in self.recorded:
                self.recorded[key] = _RecordedPass(self, wide, places, held)
            hidden = self.recorded[key].hidden(wide, places)
        except RuntimeError as error:
            self.is_off = True
            self.recorded.clear()
            given_up(error, "training")
            hidden = self.computed(wide, places)
        return hidden[:, :length]

    @contextmanager
    def aliases(self) -> Iterator[list[Tensor]]:
        """Put parameters of the same values, in the same memory, in the place of those that are trained.

        Autograd remembers on which stream a parameter was used first, and goes back there for its gradient: out of the
        recording. These are used first in it.
        """
        made = {id(parameter): nn.Parameter(parameter.detach()) for parameter in self.parameters}
        changed: list[tuple[dict[str, Any], str, Any]] = []
        for module in {id(x): x for root in (*self.roots, self.spec.decoder) for x in root.modules()}.values():
            for name, parameter in module._parameters.items():
                if id(parameter) in made:
                    changed.append((module._parameters, name, parameter))
        for table, name, parameter in changed:
            table[name] = made[id(parameter)]
        try:
            yield list(made.values())
        finally:
            for table, name, parameter in changed:
                table[name] = parameter

    def computed(self, embeds: Tensor, positions: Tensor) -> Tensor:
        """Return the last states [B, T, D], what precedes the decoder's forward included."""
        decoder, given = self.spec.decoder, {"inputs_embeds": embeds, "position_ids": positions, "use_cache": False}
        for key, hook in list(decoder._forward_pre_hooks.items()):
            with_kwargs = key in decoder._forward_pre_hooks_with_kwargs
            hook(decoder, (), given) if with_kwargs else hook(decoder, ())  # type: ignore[call-arg]
        return self.compute(decoder, **given).last_hidden_state


class _RecordedPass:
    """One forward and one backward pass of one shape."""

    def __init__(self, owner: RecordedDecoder, embeds: Tensor, positions: Tensor, held: object) -> None:
        self.owner, self.held, self.uses, self.learns = owner, held, 0, embeds.requires_grad
        self.embeds, self.positions = embeds.detach().clone(), positions.clone()
        self.learnt: list[Tensor] = []
        self.gradient = embeds  # of the output; a place of its own once the size is known
        wanted, wanted_gradients = warmed(self._both)
        self.forward, made = record(self._forward, owner.pool)
        self.gradient = self.gradient.clone()
        self.backward, self.gradients = record(self._backward, owner.pool)
        (self.out,) = (out.detach() for out in made if out is not None)
        del self.live, self.learnt
        self.forward()
        compare([self.out], [wanted])
        self.backward()
        compare(self.gradients, wanted_gradients)

    def _forward(self) -> list[Tensor]:
        embeds = self.embeds.detach().requires_grad_(self.learns)
        with self.owner.aliases() as aliases:
            self.live = self.owner.computed(embeds, self.positions)
        self.learnt = [*([embeds] if self.learns else []), *aliases]
        return [self.live]

    def _backward(self) -> Sequence[Tensor | None]:
        return torch.autograd.grad(self.live, self.learnt, self.gradient, allow_unused=True)

    def _both(self) -> tuple[Tensor, Sequence[Tensor | None]]:
        (out,) = self._forward()
        self.gradient = out.detach() / 256  # some gradient, that no dtype is too narrow for
        return out.detach().clone(), self._backward()

    def hidden(self, embeds: Tensor, positions: Tensor) -> Tensor:
        """Return the last states of a batch."""
        out = _Replayed.apply(self, positions, embeds, *self.owner.parameters)
        self.uses += 1
        if self.uses in COMPARED:
            with torch.no_grad():
                compare([out], [self.owner.computed(embeds, positions)])
        return out


class _Replayed(torch.autograd.Function):
    """A recorded pass as one operator: [B, T, D] to [B, T, D]."""

    @staticmethod
    def forward(ctx: Any, recorded: _RecordedPass, positions: Tensor, embeds: Tensor, *_: Tensor) -> Tensor:
        recorded.embeds.copy_(embeds)
        recorded.positions.copy_(positions)
        recorded.forward()
        ctx.recorded, ctx.learns = recorded, embeds.requires_grad
        return recorded.out.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        recorded = ctx.recorded
        recorded.gradient.copy_(grad)
        recorded.backward()
        # copies: autograd may keep what it is given as `.grad`, and the next pass writes to the same place
        gradients = [None if gradient is None else gradient.clone() for gradient in recorded.gradients]
        return None, None, *([] if ctx.learns else [None]), *gradients


@contextmanager
def recorded_passes(decoder: RecordedDecoder) -> Iterator[None]:
    """Let the decoder run by recorded passes inside the block."""
    module: Any = decoder.spec.decoder
    module.forward = decoder.forward
    try:
        yield
    finally:
        del module.forward


class TokenPass:
    """One decoded token of every row, recorded.

    Attributes:
        key: rows, width of the cache, what is attached.
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
        self.logits: Any = None

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
        if self._replay is None or self.uses in COMPARED:
            self._try()

    def _try(self) -> None:
        """Record the pass where it is not, and compare it with the computed one; all is then as it was."""
        state = [self.newest, self.position, self.place, self.seen]
        before = [x.clone() for x in state]

        def back() -> None:
            for x, value in zip(state, before, strict=True):
                x.copy_(value)

        wanted = warmed(self._compute)[0].clone()
        back()
        if self._replay is None:
            self._replay, (self.logits,) = record(self._compute, None)
            back()
        self._replay()
        compare([self.logits], [wanted])
        back()

    def replay(self) -> None:
        """Write a token of every row.

        Raises:
            WorkError: nothing was begun.
        """
        if self._replay is None:
            raise WorkError("no pass was recorded")
        self._replay()

    def _compute(self) -> list[Tensor]:
        self.seen.index_fill_(3, self.place, True)
        logits = self.model(
            input_ids=self.newest, attention_mask=self.seen, position_ids=self.position, past_key_values=self.cache,
            use_cache=True, logits_to_keep=1,
        ).logits  # fmt: skip
        best = self._best(logits)
        self.newest.copy_(best)
        self.position.add_(1)
        self.place.add_(1)
        return [logits]

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
