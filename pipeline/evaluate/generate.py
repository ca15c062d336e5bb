"""Text from a backbone for many prompts, and answers for samples: batches of like length, cut at stop strings.

What all prompts begin with, an instruction or demonstrations, is computed once: the keys and values of the common head
are kept and given to every batch, whose rows are then the rest. A causal decoder's states of the head do not depend on
what follows, so the answers are those of the whole prompts.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.adapters.attach import edited_attention, is_edited
from pipeline.adapters.pack import Pack, PackRows
from pipeline.attention.virtual import virtual_attention
from pipeline.backbones.base import placed
from pipeline.backbones.decoder import decoder_of, told
from pipeline.backbones.load import Loaded
from pipeline.backbones.passes import GRAPHS_ON, TokenPass, bytes_of_row, is_out_of_memory
from pipeline.core.errors import InputError
from pipeline.data.manifest import Manifest
from pipeline.data.sample import Sample
from pipeline.prompts.collate import collate
from pipeline.prompts.prompt import LEAST_SAVED, Encoded, shared_prefix_length, stop_strings
from pipeline.resident.resident import Resident
from pipeline.resident.visual_tokens import VisualTokens
from pipeline.tasks import of_manifest

_WIDTHS = 64  # tokens: the width of a recorded pass's cache is a multiple, so that few are recorded


def cut_at_stop(text: str, stop_strings: Sequence[str]) -> str:
    """Return `text` up to the first stop string, without surrounding white space."""
    ends = [place for stop in stop_strings if (place := text.find(stop)) >= 0]
    return text[: min(ends, default=len(text))].strip()


class _Stops:
    """Knows where a row's text holds a stop string; only a row whose newest token may end one is decoded: few are."""

    def __init__(self, tokenizer: Any, stop_strings: Sequence[str]) -> None:
        self.tokenizer, self.stops = tokenizer, tuple(stop_strings)
        self.last_letters = {stop[-1] for stop in self.stops}
        self._may_end: dict[int, bool] = {}

    def end(self, row: Sequence[int]) -> bool:
        """Whether the newest of a row's tokens ends it."""
        if not self.stops or not self._token_may_end(row[-1]):
            return False
        text = self.tokenizer.decode(row, skip_special_tokens=True)
        return any(stop in text for stop in self.stops)

    def _token_may_end(self, token: int) -> bool:
        if token not in self._may_end:
            text = self.tokenizer.decode([token])
            # A token may hold the last bytes of a letter whose first bytes are in the tokens before it.
            self._may_end[token] = "\ufffd" in text or not text or bool(self.last_letters & set(text))
        return self._may_end[token]


class _StopAt:
    """Ends a row as soon as its new text holds a stop string; what transformers asks after every token.

    Args:
        stops: where that is.
        prompt_length: tokens before the new text.
        lags: look at what was there at the last call, a token late: on a GPU that is known without waiting. For greedy
            decoding, where a token more changes nothing that is kept.
    """

    def __init__(self, stops: _Stops, prompt_length: int, *, lags: bool = False) -> None:
        self.stops, self.start = stops, prompt_length
        self.lags, self._coming = lags, list[_Coming]()
        self._written: list[list[int]] = []

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        rows = self._late(input_ids[:, -1]) if self.lags else input_ids[:, self.start :].tolist()
        done = [self.stops.end(row) for row in rows] or [False] * len(input_ids)
        return placed(torch.tensor(done), input_ids.device)

    def _late(self, newest: Tensor) -> list[list[int]]:
        for coming in self._coming:  # over since transformers asked whether all rows have ended
            self._written = self._written or [[] for _ in newest]
            for row, token in zip(self._written, coming.arrived(), strict=True):
                row.append(token)
        self._coming = [_Coming(newest)]
        return self._written


@dataclass(frozen=True)
class Experts:
    """Prompts that write one answer together: p(token) ~ prod_c p_c(token)^w_c, a product of experts.

    Attributes:
        prompts: of the one query, each behind demonstrations of its own.
        weights: w_c, one a prompt; a prompt of weight 0 has no say.
    """

    prompts: tuple[Encoded, ...]
    weights: tuple[float, ...]


class _Product:
    """Gives rows that stand together the same scores; what transformers asks for every token.

    Args:
        weights: [B, C] of C rows for each of B answers.
    """

    def __init__(self, weights: Tensor) -> None:
        self.weights = weights

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        rows = scores.log_softmax(-1).unflatten(0, self.weights.shape)
        weights = self.weights.to(scores)[..., None]
        mixed = torch.where(weights > 0, weights * rows, 0.0).sum(1)
        return mixed.repeat_interleave(self.weights.shape[1], 0)


class _Coming:
    """The newest tokens [B] on their way to the host."""

    def __init__(self, newest: Tensor) -> None:
        cuda = newest.device.type == "cuda"
        self._host = torch.empty(newest.shape, dtype=newest.dtype, pin_memory=cuda)
        self._host.copy_(newest, non_blocking=True)
        self._event = torch.cuda.Event() if cuda else None
        if self._event is not None:
            self._event.record()

    def arrived(self) -> list[int]:
        """Wait for them."""
        if self._event is not None:
            self._event.synchronize()
        return self._host.tolist()


def longest_first(requests: Sequence[Encoded]) -> list[int]:
    """Return the order of generation: the longest first, so that too little memory shows at once."""
    return sorted(range(len(requests)), key=lambda i: (-len(requests[i]), i))


def of_part(requests: Sequence[Encoded], batch_size: int, part: tuple[int, int]) -> list[int]:
    """Return the requests in every n-th batch from the i-th on, for `part` (i, n), in their own order.

    Their batches are those of the whole, however many parts there are, so the parts together are the whole to the bit.
    """
    order = longest_first(requests)
    starts = range(part[0] * batch_size, len(order), part[1] * batch_size)
    return sorted(i for start in starts for i in order[start : start + batch_size])


@torch.no_grad()
def generate(
    loaded: Loaded,
    requests: Sequence[Encoded],
    *,
    max_new_tokens: int,
    visual_tokens: VisualTokens,
    root: Path | str = "",
    num_beams: int = 1,
    length_penalty: float = 1.0,
    stop_strings: Sequence[str] = ("\n",),
    batch_size: int = 64,
    from_pixels: bool = False,
    pack: Pack | None = None,
    members: Sequence[int] = (),
    on_batch: Callable[[], None] = lambda: None,
    experts: Sequence[Experts] = (),
) -> list[str]:
    """Return what the model writes after each prompt, greedily or by beam search.

    Whatever is attached to the model takes part; the result does not depend on how prompts share batches. Where all
    requests begin with the same demonstrations, these are computed once.

    Args:
        loaded: the backbone.
        requests: open prompts (`encode_all` of a `render` without answer).
        max_new_tokens: most tokens of an answer.
        visual_tokens: where the images' visual tokens come from.
        root: the data root of the images.
        num_beams: 1 is greedy.
        length_penalty: exponent of the length that a beam's log-probability is divided by.
        stop_strings: the text is cut where the first of them begins (`prompt.stop_strings`).
        batch_size: most prompts at once; fewer where the card does not hold them.
        from_pixels: run the vision tower on the pixels, for methods that train it.
        pack: the adapters that are attached, where there are several.
        members: the adapter of every request in that pack.
        on_batch: called after every batch, to show that the process is alive.
        experts: one a request, all of as many prompts: these are read in its place.

    Returns:
        One text a request, in order, stop string and surrounding white space removed.
    """
    texts = [""] * len(requests)
    order, count = longest_first(requests), len(experts[0].prompts) if experts else 1
    batch_size = max(1, batch_size // count)
    device = loaded.device
    # beam search copies images by row, those of the shared head too; every adapter of a pack has a head of its own
    plain = num_beams == 1 and len(set(members)) <= 1 and not experts and loaded.family.shares_prefix
    heads = _heads(requests, loaded, from_pixels=from_pixels) if plain else []

    def kept_head(_: Sequence[Encoded]) -> list[Prefix]:
        if pack is not None:
            pack.use(PackRows(tuple(members[:1]), (len(heads[0].images),)))
        return [Prefix.of(heads[0], loaded, visual_tokens, root)]

    made = loaded.passes.run("generation", heads, kept_head)
    prefix = made[0] if made else None
    beside = prefix is not None and can_stand_beside(loaded)
    settings: dict[str, Any] = {"do_sample": False, "num_beams": num_beams, "max_new_tokens": max_new_tokens}
    if num_beams > 1:
        settings["length_penalty"] = length_penalty

    # worth recording where there is more than one batch
    recorded = num_beams == 1 and not experts and len(requests) > batch_size and Greedy.serves(loaded)
    greedy = Greedy(loaded) if recorded else None
    stops = _Stops(loaded.tokenizer, stop_strings)

    def answered(chosen: Sequence[int]) -> list[str]:
        rows = [without_head(requests[i], heads[0]) if prefix else requests[i] for i in chosen]
        if experts:
            rows = [prompt for i in chosen for prompt in experts[i].prompts]
        if from_pixels:
            images: dict[str, Any] = {"pixels": visual_tokens.pixels([row.images for row in rows], root)}
        else:
            images = {"visual": visual_tokens.get([image for row in rows for image in row.images], root)}
        batch = collate(rows, loaded, side="left", **images).to(device)
        if pack is not None:
            pack.use(PackRows(tuple(members[i] for i in chosen), batch.image_counts))
        inputs = batch.model_inputs(loaded)
        if prefix is not None:
            inputs = prefix.before(inputs, beside=beside)
        width = inputs["input_ids"].shape[1]
        stop = _StopAt(stops, width, lags=num_beams == 1 and torch.device(device).type != "cpu")
        with told(device, padded=len({len(row) for row in rows}) > 1):
            if greedy is not None and greedy.takes(inputs, max_new_tokens):
                made = greedy.write(inputs, max_new_tokens, stops.end, pack.state if pack else (None, None))
                return answered(chosen) if made is None else kept(made)  # anew: what was read is used up
            out = loaded.model.generate(
                **inputs,
                **settings,
                use_cache=True,
                suppress_tokens=loaded.never_generated,
                synced_gpus=loaded.passes.together,  # a rank that has finished goes on until all have
                stopping_criteria=[stop] if stop_strings else None,
                logits_processor=[_Product(torch.tensor([experts[i].weights for i in chosen]))] if experts else None,
            )
        return kept(out[::count, width:])

    def kept(tokens: Any) -> list[str]:
        on_batch()
        written = loaded.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return [cut_at_stop(text, stop_strings) for text in written]

    with prefix.beside(loaded) if prefix and beside else nullcontext():
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            later = order[start + batch_size : start + 2 * batch_size]
            visual_tokens.ahead((image for i in later for image in requests[i].images), root, pixels=from_pixels)
            answers = loaded.passes.run(
                "generation", chosen, answered, width=lambda i: count * len(requests[i]), device=device,
                bytes_of=lambda tokens: bytes_of_row(
                    loaded.model, tokens, new=max_new_tokens, beams=num_beams, caches=1 if greedy is None else 2
                ),
            )  # fmt: skip
            for i, text in zip(chosen, answers, strict=True):
                texts[i] = text
    visual_tokens.forget_ahead()
    return texts


class Greedy:
    """Greedy decoding on a GPU, a token of all rows by one recorded pass that is launched ahead of the host.

    Keys and values lie in a cache of a fixed width, and a mask says what of it is there. Texts are those of
    `model.generate`, up to how attention over a wider cache rounds. Where a pass cannot be recorded, or gives something
    else than the computed one, that is said once and `write` gives nothing.
    """

    def __init__(self, loaded: Loaded) -> None:
        self.loaded, self.is_off = loaded, False
        self._pass: TokenPass | None = None

    @staticmethod
    def serves(loaded: Loaded) -> bool:
        """Whether a backbone's tokens have plain positions, its device records, and its weights stay in their place."""
        recorded = torch.device(loaded.device).type == GRAPHS_ON and not loaded.passes.together
        return recorded and loaded.family.shares_prefix

    def takes(self, inputs: Mapping[str, Any], new: int) -> bool:
        """Whether a batch is decoded so: no layer hides what is far behind, and no token has a type."""
        window = getattr(decoder_of(self.loaded.model).text_config, "sliding_window", None) or math.inf
        typed = any(name.endswith("token_type_ids") for name in inputs)
        return not (self.is_off or typed) and self._width(inputs, new) <= window

    @staticmethod
    def _width(inputs: Mapping[str, Any], new: int) -> int:
        return -(-(inputs["input_ids"].shape[1] + new) // _WIDTHS) * _WIDTHS

    def write(
        self, inputs: Mapping[str, Any], new: int, ends: Callable[[Sequence[int]], bool], state: tuple[Hashable, object]
    ) -> list[list[int]] | None:
        """Return each row's new tokens, without the end of the text; None where passes cannot be recorded.

        Args:
            inputs: of a left-padded batch, as `model.generate` takes them.
            new: most tokens of a row.
            ends: whether the newest of a row's tokens ends it.
            state: of what is attached (`Pack.state`).
        """
        from transformers import DynamicCache

        model = self.loaded.model
        cache = inputs.get("past_key_values") or DynamicCache()
        known, ids = cache.get_seq_length(), inputs["input_ids"]
        mask, positions = inputs["attention_mask"], inputs["position_ids"]
        given = {**inputs, "input_ids": ids[:, known:], "position_ids": positions[:, known:], "past_key_values": cache}
        logits = model(**given, use_cache=True, logits_to_keep=1).logits
        key = (len(ids), self._width(inputs, new), state[0])
        try:
            if self._pass is None or self._pass.key != key:
                self._pass = None  # its memory is free for the next
                self._pass = TokenPass(self.loaded.model, self.loaded.never_generated, cache, key, state[1])
            self._pass.begin(cache, logits, mask, positions)
            return self._written(self._pass, new, ends)
        except RuntimeError as error:
            self._pass = None
            if is_out_of_memory(error):
                raise
            self.is_off = True
            text = str(error).strip().splitlines() or [""]
            warnings.warn(f"tokens are decoded without CUDA graphs: {type(error).__name__}: {text[0]}", stacklevel=2)
            return None

    def forget(self) -> None:
        """Give the recorded pass's memory back."""
        self._pass = None

    def _written(self, token: TokenPass, new: int, ends: Callable[[Sequence[int]], bool]) -> list[list[int]]:
        rows: list[list[int]] = [[] for _ in range(token.key[0])]
        ended, eos, coming = set[int](), set(self.loaded.eos_token_ids), _Coming(token.newest[:, 0])
        for number in range(1, new + 1):  # the host looks at a token while the device computes the next
            before = coming
            if number < new:
                token.replay()
                coming = _Coming(token.newest[:, 0])
            for row, value in enumerate(before.arrived()):
                if row in ended:
                    continue
                if value not in eos:
                    rows[row].append(value)
                if value in eos or ends(rows[row]):
                    ended.add(row)
            if len(ended) == len(rows):
                break
        return rows


def _heads(requests: Sequence[Encoded], loaded: Loaded, *, from_pixels: bool) -> list[Encoded]:
    """Return the common head, where there is one on every rank; where the tower is run, only one without images."""
    head = common_head(requests, loaded.image_token_id)
    everywhere = all(loaded.passes.of_ranks(head is not None and not (from_pixels and head.images)))
    return [head] if head is not None and everywhere else []


def common_head(requests: Sequence[Encoded], image_token_id: int) -> Encoded | None:
    """Return what all requests begin with, or None where a pass of it saves too little.

    Demonstrations that are the same for all; of prompts that differ there, the text in front of the first image. What
    the query's own turn begins with is in it, up to the query's image; a token of every request is left.
    """
    if len(requests) < 2:
        return None
    first = requests[0]
    shown, start, image = first.input_ids[: first.query_start], first.query_start, first.query_image
    shows_same = all(
        request.query_start == start and request.query_image == image
        and request.input_ids[:start] == shown and request.images[:image] == first.images[:image]
        for request in requests
    )  # fmt: skip
    if not shows_same:
        start = image = 0
    length = start + shared_prefix_length([request.input_ids[start:] for request in requests], image_token_id)
    length = min(length, *(len(request) - 1 for request in requests))
    if length < LEAST_SAVED * sum(map(len, requests)) / (len(requests) - 1):
        return None
    return Encoded(first.input_ids[:length], first.images[:image], 0, None, first.sample_id)


def without_head(request: Encoded, head: Encoded) -> Encoded:
    """Return what follows the common head in a request."""
    ids, images = request.input_ids[len(head) :], request.images[len(head.images) :]
    return replace(request, input_ids=ids, images=images, query_start=0, query_image=0)


def can_stand_beside(loaded: Loaded) -> bool:
    """Whether a head's keys and values can be attended to as virtual tokens are, instead of copied to every row.

    That is computed where nothing else is attached to attention and every layer sees all that is before it; on a GPU a
    recorded pass reads one cache.
    """
    spec = decoder_of(loaded.model)
    hides = any(getattr(spec.text_config, name, None) for name in ("sliding_window", "attn_logit_softcapping"))
    return torch.device(loaded.device).type == "cpu" and not hides and not is_edited(spec)


@dataclass(frozen=True)
class Prefix:
    """The token ids of a common head, and the cache of its keys and values, of one row."""

    tokens: tuple[int, ...]
    cache: Any

    @classmethod
    @torch.no_grad()
    def of(cls, head: Encoded, loaded: Loaded, visual_tokens: VisualTokens, root: Path | str) -> Prefix:
        """Run the head through the model, with whatever is attached to it."""
        visual = visual_tokens.get(list(head.images), root) if head.images else None
        batch = collate([head], loaded, visual=visual).to(loaded.device)
        out = loaded.model.model(**batch.model_inputs(loaded), use_cache=True)
        return cls(head.input_ids, out.past_key_values)

    def before(self, inputs: Mapping[str, Any], *, beside: bool) -> dict[str, Any]:
        """Return `generate`'s arguments for left-padded queries behind the head, whose positions go on from it.

        In every row stands a copy of the head, if it does not stand `beside` them. The pads of a row are between the
        head and the query; the mask hides them.
        """
        rows, length = len(inputs["input_ids"]), len(self.tokens)
        inputs = {**inputs, "position_ids": inputs["position_ids"] + length}
        if beside:
            return inputs
        head = torch.tensor(self.tokens, device=inputs["input_ids"].device).expand(rows, length)
        cache = copy.deepcopy(self.cache)
        cache.batch_repeat_interleave(rows)
        inputs["past_key_values"] = cache
        inputs["input_ids"] = torch.cat([head, inputs["input_ids"]], dim=1)
        inputs["attention_mask"] = torch.cat([torch.ones_like(head), inputs["attention_mask"]], dim=1)
        counted = torch.arange(length, device=head.device).expand(rows, length)
        inputs["position_ids"] = torch.cat([counted, inputs["position_ids"]], dim=1)
        return inputs

    def beside(self, loaded: Loaded) -> AbstractContextManager[None]:
        """Let every row attend to the head, which stands once, besides its own tokens; inside a block."""
        spec = decoder_of(loaded.model)
        groups = spec.num_heads // spec.num_kv_heads
        kept = [self.cache.layers[attention.layer_idx] for attention in spec.attentions]
        heads = [tuple(x.repeat_interleave(groups, 1)[0] for x in (layer.keys, layer.values)) for layer in kept]
        return edited_attention(spec, [partial(_besides, keys, values) for keys, values in heads])


def _besides(
    keys: Tensor, values: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, scale: float | None,
    causal: bool,
) -> Tensor:  # fmt: skip
    """Attend to a head's keys and values [H, n, d] and the context."""
    return virtual_attention(q, k, v, keys=keys, values=values, mask=mask, scale=scale, causal=causal)


SplitPart = tuple[int, int]  # (i, n): every n-th batch from the i-th on
WHOLE: SplitPart = (0, 1)


@dataclass(frozen=True)
class Decoding:
    """How answers are generated.

    Attributes:
        max_new_tokens: None: the task's own.
        num_beams: 1 is greedy.
        length_penalty: of beam search.
        batch_size: prompts at once.
        from_pixels: run the vision tower, for methods that train it.
    """

    max_new_tokens: int | None = None
    num_beams: int = 1
    length_penalty: float = 1.0
    batch_size: int = 64
    from_pixels: bool = False


def predict(
    resident: Resident,
    manifest: Manifest,
    samples: Sequence[Sample],
    decoding: Decoding,
    demonstrations: Callable[[Sample], list[Sample]] | None = None,
    part: SplitPart = WHOLE,
    chunks: Callable[[Sample], Sequence[Chunk]] | None = None,
    on_batch: Callable[[], None] = lambda: None,
) -> dict[Any, str]:
    """Return the answer to every sample of the `part`, by id.

    Args:
        resident: the backbone.
        manifest: of the samples.
        samples: the split's.
        decoding: how answers are generated.
        demonstrations: of a sample, before it in its prompt.
        part: which batches.
        chunks: its demonstrations in chunks, each in a prompt of its own (`Experts`); as many for every sample.
        on_batch: called after every batch.

    Raises:
        InputError: chunks, and a search with beams.
    """
    if demonstrations is None:
        prompts = resident.alone(manifest, samples, answer=False)
    else:
        prompts = resident.prompts(manifest, samples, [demonstrations(sample) for sample in samples], answer=False)
    chosen = of_part(prompts, decoding.batch_size, part)
    experts: list[Experts] = []
    if chunks is not None:
        if decoding.num_beams > 1:
            way_out = "Set evaluate.num_beams to 1"
            raise InputError("several prompts that write one answer do it greedily", way_out=way_out)
        experts = [_experts(resident, manifest, samples[i], chunks(samples[i])) for i in chosen]
    texts = _answers(resident, manifest, [prompts[i] for i in chosen], decoding, experts=experts, on_batch=on_batch)
    return {samples[i].sample_id: text for i, text in zip(chosen, texts, strict=True)}


Chunk = tuple[float, list[Sample]]  # demonstrations of one prompt, and its weight


def _experts(resident: Resident, manifest: Manifest, sample: Sample, chunks: Sequence[Chunk]) -> Experts:
    demonstrations = [shown for _, shown in chunks]
    prompts = resident.prompts(manifest, [sample] * len(chunks), demonstrations, answer=False)
    return Experts(tuple(prompts), tuple(weight for weight, _ in chunks))


def predict_each(
    resident: Resident,
    manifest: Manifest,
    samples: Sequence[Sample],
    pack: Pack,
    members: Sequence[int],
    decoding: Decoding,
    part: SplitPart = WHOLE,
    on_batch: Callable[[], None] = lambda: None,
) -> list[dict[Any, str]]:
    """Return what the `members` of a pack answer to the same samples, decoded in shared batches.

    Returns:
        One mapping of id to answer for every entry of `members`.
    """
    prompts = resident.alone(manifest, samples, answer=False) * len(members)
    chosen = of_part(prompts, decoding.batch_size, part)
    of_chosen = [members[i // len(samples)] for i in chosen]
    texts = _answers(
        resident, manifest, [prompts[i] for i in chosen], decoding, pack=pack, members=of_chosen, on_batch=on_batch
    )
    answers: list[dict[Any, str]] = [{} for _ in members]
    for i, text in zip(chosen, texts, strict=True):
        answers[i // len(samples)][samples[i % len(samples)].sample_id] = text
    return answers


def _answers(
    resident: Resident, manifest: Manifest, prompts: Sequence[Encoded], decoding: Decoding, **of_pack: Any
) -> list[str]:
    """Return the answers to prompts, cut where the task's template and the backbone's say."""
    task = of_manifest(manifest)
    return generate(
        resident.loaded,
        prompts,
        max_new_tokens=decoding.max_new_tokens or task.max_new_tokens,
        visual_tokens=resident.visual,
        root=manifest.image_root,
        num_beams=decoding.num_beams,
        length_penalty=decoding.length_penalty,
        stop_strings=stop_strings(task.template, resident.loaded.backbone, manifest.prompt),
        batch_size=decoding.batch_size,
        from_pixels=decoding.from_pixels,
        **of_pack,
    )
