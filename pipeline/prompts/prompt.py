"""From samples to the text a backbone reads, and from that text to token ids with the answer's span.

Base models read the papers' plain lines; a chat model reads the same wording inside its turns, one pair of turns a
demonstration.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from string import ascii_uppercase
from typing import TYPE_CHECKING, Any

from pipeline.backbones.base import Backbone, RoleLines
from pipeline.core.errors import InputError, WorkError
from pipeline.core.plain_yaml import Json
from pipeline.data import image_files
from pipeline.data.sample import ImageRef, PromptStyle, Sample

if TYPE_CHECKING:
    from pipeline.backbones.load import Loaded
    from pipeline.tasks import PromptTemplate

Span = tuple[int, int]
_IMAGE = re.compile(r"(\w+: *)?\{image\} *")  # of a task's wording, with the word in front of it
LEAST_SAVED = 0.2  # of a batch's tokens, by computing once what its prompts begin with; less is not worth the detour
ImageSizes = tuple[image_files.ImageSize, ...]  # of a prompt's images


@dataclass(frozen=True, slots=True)
class Rendered:
    """A prompt as text, with one image token for each image.

    Attributes:
        text: what the processor would be given.
        images: in the order of their tokens: demonstrations first, the query's last.
        query_start: character where the query's own turn begins.
        answer_span: characters of the answer with its leading space and its terminator; None for an open query.
        sample_id: of the query.
        query_image: the first of `images` that is the query's own.
        num_shots: demonstrations before the query.
    """

    text: str
    images: tuple[ImageRef, ...]
    query_start: int
    answer_span: Span | None
    sample_id: int | str
    query_image: int = 0
    num_shots: int = 0


@dataclass(frozen=True, slots=True)
class Encoded:
    """A prompt as token ids, images expanded.

    Attributes:
        input_ids: with the start token where the model has one.
        images: in the order of their tokens.
        query_start: first token of the query's own turn. Compare two encodings of one query from the end: the first
            token after a demonstration can differ from the first of a text.
        answer_span: tokens of the answer, terminator included; None for an open query.
        sample_id: of the query.
        query_image: the first of `images` that is the query's own.
    """

    input_ids: tuple[int, ...]
    images: tuple[ImageRef, ...]
    query_start: int
    answer_span: Span | None
    sample_id: int | str
    query_image: int = 0

    def __len__(self) -> int:
        return len(self.input_ids)


def render(
    template: PromptTemplate, backbone: Backbone, query: Sample, demos: Sequence[Sample] = (), *, answer: bool = False,
    style: PromptStyle = "papers",
) -> Rendered:  # fmt: skip
    """Return the prompt of `query` after `demos`.

    Args:
        template: the task's wording.
        backbone: decides between plain lines and chat turns.
        query: its target is written only with `answer`.
        demos: demonstrations, in order.
        answer: whether the query's target closes the text (training), or the text ends where it should begin.
        style: the papers' wording, or the published code's roles (where that code knows the backbone).
    """
    instructed = bool(demos) or not template.prefix_needs_demos
    prefix = template.prefix if instructed else ""
    answers = [*(demo.shown for demo in demos), query.target]
    roles = roles_of(backbone, style)
    if roles is not None:
        words = template.instruction if instructed else ""
        head = roles.instruction.format(text=words) if words else ""
        open_turns = [_open_roles(roles, template, backbone, sample) for sample in (*demos, query)]
        closings = [roles.answer.format(answer=_answer(text, backbone)) for text in answers]
        between = roles.after
    elif backbone.chat is None:
        head = prefix
        open_turns = [_open_turn(template, backbone, sample) for sample in (*demos, query)]
        closings = [template.answer.format(answer=_answer(text, backbone)) for text in answers]
        between = ""
    else:
        chat, samples = backbone.chat, (*demos, query)
        head = chat.head
        openings = [chat.assistant_open] * len(demos) + [chat.answer_open or chat.assistant_open]
        open_turns = [
            _chat_turn(template, backbone, sample, "" if i else prefix, opening)
            for i, (sample, opening) in enumerate(zip(samples, openings, strict=True))
        ]
        closings = [
            template.answer.format(answer=_answer(text, backbone)).rstrip("\n") + backbone.chat.terminator
            for text in answers
        ]
        between = backbone.chat.after
    shown = zip(open_turns[:-1], closings[:-1], strict=True)
    text = head + "".join(turn + closing + between for turn, closing in shown)
    # The instruction is no part of the query's turn, though it stands inside it when there is no demonstration.
    query_start = len(text)
    text += open_turns[-1]
    span = None
    if answer:
        span = (len(text), len(text) + len(closings[-1]))
        text += closings[-1]
    images = tuple(image for sample in (*demos, query) for image in sample.images)
    return Rendered(text, images, query_start, span, query.sample_id, len(images) - len(query.images), len(demos))


def _open_turn(template: PromptTemplate, backbone: Backbone, sample: Sample, wording: str | None = None) -> str:
    question = neutral(sample.question or "", backbone).strip()
    return (wording or template.query).format(image=backbone.image_text * len(sample.images), question=question)


def _chat_turn(template: PromptTemplate, backbone: Backbone, sample: Sample, prefix: str, opening: str) -> str:
    chat: Any = backbone.chat
    wording, images = None, ""
    if chat.images_first:  # so that no word is left that says where an image is
        wording = _IMAGE.sub("", template.query)
        images = backbone.image_text * len(sample.images) + (chat.images_close if sample.images else "")
    # "Image: <image> Question: ... Answer:" -> the user's part, and the cue that opens the assistant's
    line = _open_turn(template, backbone, sample, wording)
    at = max(line.rfind(" "), line.rfind("\n"))
    asked, cue = line[: max(at, 0)], line[at + 1 :]
    return chat.user_open + images + prefix + asked + chat.user_close + opening + cue


def roles_of(backbone: Backbone, style: PromptStyle) -> RoleLines | None:
    """Return how the published code writes roles for the backbone, where that is the style and the code knows it."""
    return backbone.published_roles if style == "published" else None


def _open_roles(roles: RoleLines, template: PromptTemplate, backbone: Backbone, sample: Sample) -> str:
    text = roles.image.format(image=backbone.image_text * len(sample.images))
    question = _in_one_line(sample)
    if question is not None:
        text += roles.question.format(text=neutral(question, backbone).strip())
    return text + roles.cue.format(role=template.cue, small_role=template.cue.lower())


def _in_one_line(sample: Sample) -> str | None:
    """Return the question as MimIC's code words it, choices behind it."""
    if "choices" not in sample.meta:
        return sample.question
    lettered = zip(ascii_uppercase, sample.meta["choices"], strict=False)
    choices = " ".join(f"{letter}. {choice}" for letter, choice in lettered)
    return f"{sample.meta['question']} Choices: {choices} Answer with the letter."


def _answer(text: str, backbone: Backbone) -> str:
    # on one line: generation ends at a line break
    return " ".join(neutral(text, backbone).split())


def neutral(text: str, backbone: Backbone) -> str:
    """Return `text` with a space inside anything that the tokenizer would read as a token of its own.

    A question that says `<image>` would otherwise ask for one image more than there is, and one that says
    `<end_of_utterance>` for a token that Idefics2's base model does not have.
    """
    for token in _longest_first(backbone.reserved):
        if token in text:
            text = text.replace(token, f"{token[0]} {token[1:]}")
    return text


@lru_cache(maxsize=32)
def _longest_first(tokens: frozenset[str]) -> tuple[str, ...]:
    # a token that is one letter, or white space, is ordinary text
    return tuple(sorted((t for t in tokens if len(t.strip()) > 1), key=lambda t: (-len(t), t)))


def stop_strings(template: PromptTemplate, backbone: Backbone, style: PromptStyle = "papers") -> tuple[str, ...]:
    """Return where generation is cut: the end of the line, the task's stop words, the end marker of the style."""
    roles = roles_of(backbone, style)
    return ("\n", *template.stop_words, *(roles.stop if roles else ()))


def template_of(template: PromptTemplate, backbone: Backbone, style: PromptStyle = "papers") -> Json:
    """Return what an adapter keeps: an open query's prompt as `text`, {question} in its place, and its `stop`s."""
    images = (ImageRef(""),) if "{image}" in template.query else ()
    query = Sample("", 0, images, "{question}" if template.asks else None, target="", references=())
    text = render(template, backbone, query, style=style).text
    return {"text": text, "stop": list(stop_strings(template, backbone, style))}


def sizes_that_matter(loaded: Loaded, rendered: Sequence[Rendered], root: Path | str = "") -> list[ImageSizes]:
    """Return each prompt's image sizes, or nothing for a backbone whose number of tokens does not depend on them.

    Raises:
        InputError: an image cannot be read, is no longer what was drawn, or has a size that the backbone does not take.
    """
    if not loaded.family.sized:
        return [()] * len(rendered)
    images = [image for prompt in rendered for image in prompt.images]
    sizes = image_files.sizes(images, root)
    for image, size in zip(images, sizes, strict=True):
        loaded.family.check_size(*size, where=str(image_files.located(image, root)))
    left = iter(sizes)
    return [tuple(islice(left, len(prompt.images))) for prompt in rendered]


def encode_all(
    loaded: Loaded,
    rendered: Sequence[Rendered],
    *,
    image_sizes: Sequence[Sequence[image_files.ImageSize]] | None = None,
    root: Path | str = "",
) -> list[Encoded]:
    """Return the token ids of prompts, with images expanded as the real processor expands them.

    Args:
        loaded: the backbone in use.
        rendered: prompts.
        image_sizes: for each prompt (height, width) of its images, where they matter; None: they are read.
        root: the data root of the images.

    Raises:
        InputError: a prompt is longer than the backbone reads, or an image's size is needed and cannot be read.
        WorkError: the tokenizer joins the answer's first character with the text before it.
    """
    if not rendered:
        return []
    family, processor = loaded.family, loaded.processor
    if "image" not in loaded.backbone.special_tokens and any(r.images for r in rendered):
        raise InputError(
            f"{loaded.backbone.name} reads text alone, and the samples have pictures",
            way_out="Use a vision-language backbone, or data with captions in place of pictures",
        )
    sizes = sizes_that_matter(loaded, rendered, root) if image_sizes is None else image_sizes
    texts = [family.expand(r.text, processor, size) for r, size in zip(rendered, sizes, strict=True)]
    ids, offsets = family.tokenise(loaded.tokenizer, texts)
    longest = getattr(loaded.model.config.get_text_config(), "max_position_embeddings", None)
    out = []
    for r, size, text, tokens, places in zip(rendered, sizes, texts, ids, offsets, strict=True):
        if longest is not None and len(tokens) > longest:
            raise InputError(
                f"the prompt of sample {r.sample_id} has {len(tokens)} tokens, {loaded.backbone.name} reads {longest}",
                way_out=_shots_that_fit(r, len(tokens), longest),
            )
        span = None
        if r.answer_span is not None:
            tail = len(r.text) - r.answer_span[1]
            # No image stands after the answer begins, so its place counts from the end of the expanded text.
            start = len(text) - (len(r.text) - r.answer_span[0])
            span = _tokens_between(places, start, len(text) - tail, r.sample_id)
        head = family.expand(r.text[: r.query_start], processor, size)
        start = _first_token(places, len(head))
        out.append(Encoded(tuple(tokens), r.images, start, span, r.sample_id, r.query_image))
    return out


def _shots_that_fit(rendered: Rendered, num_tokens: int, longest: int) -> str:
    # the query is about as long as one demonstration
    turn = -(-num_tokens // (rendered.num_shots + 1))  # rounded up, because the instruction takes a few tokens too
    fit = longest // turn - 1
    return f"About {max(fit, 0)} of {rendered.num_shots} demonstrations fit: lower num_shots"


def _tokens_between(places: Sequence[Span], start: int, end: int, sample_id: int | str) -> Span:
    inside = [i for i, (a, b) in enumerate(places) if a < b and b > start and a < end]
    if not inside or places[inside[0]][0] < start or inside[-1] - inside[0] + 1 != len(inside):
        raise WorkError(f"the answer of sample {sample_id} does not begin at a token of its own")
    return inside[0], inside[-1] + 1


def _first_token(places: Sequence[Span], start: int) -> int:
    return next(i for i, (a, b) in enumerate(places) if a < b and b > start)


def draw_demos(
    pool_ids: Sequence[int | str], query_id: int | str, k: int, seed: int, *, draw: int | str = 0,
    replacement: bool = False,
) -> list[int | str]:  # fmt: skip
    """Return `k` ids from the pool, never the query's, none twice; the same on every machine.

    Args:
        pool_ids: ids to draw from; their order is part of the result.
        query_id: the sample that the demonstrations are for.
        k: how many.
        seed: the trial's seed.
        draw: tells apart repeated draws for one query (an epoch, a step).
        replacement: draw with replacement from the whole pool, as the published code does for a teacher's prompts: an
            id can come twice, and it can be the query's own.

    Raises:
        InputError: the pool is too small.
    """
    if k == 0:
        return []
    key = hashlib.sha256(f"{seed}/{draw}/{type(query_id).__name__}:{query_id}".encode()).digest()
    generator = random.Random(int.from_bytes(key, "big"))
    if replacement and pool_ids:
        return generator.choices(pool_ids, k=k)
    others = len(pool_ids) - (query_id in pool_ids)
    if not 0 <= k <= others:
        raise InputError(
            f"{k} demonstrations are asked for, the pool has {others} beside the query",
            where="num_shots",
            way_out="Use fewer demonstrations or a larger pool (num_train_samples)",
        )
    # One more than asked, so that the query can be dropped where it was drawn.
    drawn = generator.sample(range(len(pool_ids)), min(k + 1, len(pool_ids)))
    return [pool_ids[i] for i in drawn if pool_ids[i] != query_id][:k]


def shared_prefix_length(prompts: Sequence[Sequence[int]], stop: int) -> int:
    """Return how many tokens all prompts begin with, up to the first `stop` token (an image) in them."""
    if len(prompts) < 2:
        return 0
    lowest, highest = min(map(list, prompts)), max(map(list, prompts))  # what these two share, all share
    for at, (a, b) in enumerate(zip(lowest, highest, strict=False)):
        if a != b or a == stop:
            return at
    return min(len(lowest), len(highest))
