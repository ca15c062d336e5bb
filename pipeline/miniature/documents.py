"""The documents that the miniature's decoder learns from: demonstrations in the papers' prompts, one convention each.

A document is a list of pieces (text, weight): the text between two training targets has weight 0. Pieces
are tokenised one by one and joined, which for a word-level tokenizer gives exactly the ids of the joined
text (a test holds this), and is fast because there are few different pieces.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from pipeline.miniature.lexicon import (
    ATTRIBUTES,
    QUESTIONS,
    RELATIONS,
    Convention,
    Signed,
    draw_convention,
    draw_signed,
)
from pipeline.miniature.model import Miniature, token_id

VQA_PREFIX = "Instruction: provide an answer to the question. Use the image to answer.\n"
CAPTION_PREFIX = "Instruction: provide a short caption of the input image.\n"
ANSWER_WEIGHT = 1.0
# Ends of answers are easy: a little weight is enough, and more would drown the answers.
END_WEIGHT = 0.1
Piece = tuple[str, float]
Document = tuple[list[Piece], list[int]]  # and the numbers of its images, in order


def pair_pieces(query: str, answer: str, *, prefix: str, chat: bool) -> list[Piece]:
    """Render one demonstration in the papers' prompt.

    Args:
        query: `Image: {image} Question: {question}` or `Image: {image}`.
        answer: `Answer: {answer}` or `Caption: {caption}`; the word with the colon belongs to the prompt.
        prefix: the instruction, for the first pair of a document; else empty.
        chat: as a turn of the user and one of the assistant, not as a line.

    Returns:
        pieces; the answer and its end carry weights.
    """
    role, _, text = answer.partition(" ")
    if chat:
        head = f"<|im_start|>user\n{prefix}{query}<|im_end|>\n<|im_start|>assistant\n{role}"
        return [(head, 0.0), (f" {text}", ANSWER_WEIGHT), ("<|im_end|>", END_WEIGHT), ("\n", 0.0)]
    return [(f"{prefix}{query} {role}", 0.0), (f" {text}", ANSWER_WEIGHT), ("\n", END_WEIGHT)]


@dataclass(frozen=True)
class Renderer:
    """Turns pieces into ids for one miniature."""

    spec: Miniature

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The fast tokenizer's Rust core."""
        return self.spec.make_tokenizer().backend_tokenizer

    @cached_property
    def _known(self) -> dict[str, list[int]]:
        return {}

    def vqa(self, attributes: np.ndarray, topic: int, convention: Convention | Signed, prefix: str = "") -> list[Piece]:
        """Return a question with its answer."""
        query = f"Image: {self.spec.image_text} Question: {QUESTIONS[topic]}"
        answer = f"Answer: {convention.answer(attributes, topic)}"
        return pair_pieces(query, answer, prefix=prefix, chat=self.spec.chat)

    def caption(self, attributes: np.ndarray, convention: Convention | Signed, prefix: str = "") -> list[Piece]:
        """Return a caption request with its caption."""
        answer = f"Caption: {convention.caption(attributes)}"
        return pair_pieces(f"Image: {self.spec.image_text}", answer, prefix=prefix, chat=self.spec.chat)

    def encode(self, pieces: Sequence[Piece]) -> tuple[list[int], list[float]]:
        """Return ids and weights of a document, with what the tokenizer puts before every text."""
        ids = list(self._ids(""))
        weights = [0.0] * len(ids)
        start = len(ids)
        for text, weight in pieces:
            new = self._ids(text)[start:]
            ids += new
            weights += [weight] * len(new)
        return ids, weights

    def _ids(self, text: str) -> list[int]:
        if text not in self._known:
            self._known[text] = self.tokenizer.encode(text).ids
        return self._known[text]


@dataclass(frozen=True)
class DocumentBatch:
    """Documents: ids [B, T] padded on the right, weights [B, T], image numbers [all images in order]."""

    kind: str
    input_ids: Tensor
    weights: Tensor
    images: Tensor

    def to(self, device: torch.device) -> DocumentBatch:
        """Return the batch on a device."""
        return DocumentBatch(self.kind, self.input_ids.to(device), self.weights.to(device), self.images.to(device))


@dataclass(frozen=True)
class Curriculum:
    """What the decoder is shown.

    Attributes:
        warm_up_share: share of the steps with nothing but single-image documents in one dialect, where
            read-out and simple induction are learned.
        warm_up_rest: share of such documents afterwards.
        kinds: shares of vqa, facts and captions among the others.
        num_pairs: demonstrations a document; every number of shots below it is trained at once.
        redraw: see `draw_convention`.
        one_dialect_share: share of documents in one dialect.
        num_documents: of a step; `warm_up_documents` with a single image.
        no_prefix_share: share of caption documents without the instruction, as a zero-shot prompt has it.
        signed_share: share of documents by two groups of annotators, of those with an image a pair.
    """

    warm_up_share: float = 0.1
    warm_up_rest: float = 0.1
    kinds: tuple[float, float, float] = (0.45, 0.2, 0.35)
    num_pairs: int = 9
    warm_up_pairs: int = 8
    redraw: float = 0.15
    one_dialect_share: float = 0.1
    no_prefix_share: float = 0.2
    num_documents: int = 16
    warm_up_documents: int = 16
    signed_share: float = 0.0


KINDS = ("vqa", "facts", "captions")


class DocumentSource:
    """Draws batches of documents over a pool of images."""

    def __init__(self, spec: Miniature, attributes: np.ndarray, curriculum: Curriculum, rng: np.random.Generator):
        self.renderer = Renderer(spec)
        self.attributes, self.curriculum, self.rng = attributes, curriculum, rng
        tokenizer = spec.make_tokenizer()
        self._pad = int(tokenizer.pad_token_id)
        self._next = None if spec.chat else token_id(tokenizer, "Image:")

    def draw(self, done: float) -> DocumentBatch:
        """Draw a batch.

        Args:
            done: share of the decoder phase that has passed, in [0, 1].
        """
        c, rng = self.curriculum, self.rng
        if done < c.warm_up_share or rng.random() < c.warm_up_rest:
            kind, documents = "warm-up", [self._single_image() for _ in range(c.warm_up_documents)]
        else:
            kind = KINDS[int(np.searchsorted(np.cumsum(c.kinds)[:-1], rng.random(), side="right"))]
            documents = [self.document(kind) for _ in range(c.num_documents)]
        return self.collate(kind, documents)

    def collate(self, kind: str, documents: Sequence[Document]) -> DocumentBatch:
        """Tokenise and pad documents given as (pieces, image numbers)."""
        rows = [self.renderer.encode(pieces) for pieces, _ in documents]
        length = max(len(ids) for ids, _ in rows)
        input_ids = torch.full((len(rows), length), self._pad)
        weights = torch.zeros(len(rows), length)
        for row, (ids, weight) in enumerate(rows):
            input_ids[row, : len(ids)] = torch.tensor(ids)
            weights[row, : len(weight)] = torch.tensor(weight)
        if self._next is not None:
            # Without turns, what shows the end of an answer is the next pair's first word: the stop word.
            weights[input_ids == self._next] = END_WEIGHT
        images = torch.tensor([number for _, images in documents for number in images])
        return DocumentBatch(kind, input_ids, weights, images)

    def document(self, kind: str) -> Document:
        """Draw one document with an image a pair; topics repeat, so that there is something to look up."""
        c, rng = self.curriculum, self.rng
        convention: Convention | Signed
        if c.signed_share and rng.random() < c.signed_share:
            convention = draw_signed(rng, redraw=c.redraw)
        else:
            convention = draw_convention(rng, redraw=c.redraw, one_dialect=rng.random() < c.one_dialect_share)
        images = rng.integers(len(self.attributes), size=c.num_pairs)
        pieces: list[Piece] = []
        if kind == "captions":
            prefix = "" if rng.random() < c.no_prefix_share else CAPTION_PREFIX
            for nth, image in enumerate(images):
                pieces += self.renderer.caption(self.attributes[image], convention, prefix if nth == 0 else "")
            return pieces, images.tolist()
        topics = rng.permutation(_topics(kind))[: (1, 2, 3, 4, 8)[rng.integers(5)]]
        asked = topics[rng.integers(len(topics), size=c.num_pairs)]
        for nth, (image, topic) in enumerate(zip(images, asked, strict=True)):
            prefix = VQA_PREFIX if nth == 0 else ""
            pieces += self.renderer.vqa(self.attributes[image], int(topic), convention, prefix)
        return pieces, images.tolist()

    def _single_image(self) -> Document:
        """Draw several questions about one image, in one dialect; the image is shown once.

        Only the first pair shows it: the others are the same lines without their image.
        """
        c, rng = self.curriculum, self.rng
        convention = draw_convention(rng, one_dialect=True)
        image = int(rng.integers(len(self.attributes)))
        pieces: list[Piece] = []
        shown = f"Image: {self.renderer.spec.image_text} "
        for nth, topic in enumerate(rng.permutation(len(QUESTIONS))[: c.warm_up_pairs]):
            (head, weight), *rest = self.renderer.vqa(
                self.attributes[image], int(topic), convention, VQA_PREFIX if nth == 0 else ""
            )
            pieces += [(head if nth == 0 else head.replace(shown, ""), weight), *rest]
        return pieces, [image]


def _topics(kind: str) -> np.ndarray:
    seen = np.arange(len(ATTRIBUTES))
    return seen if kind == "vqa" else len(ATTRIBUTES) + np.arange(len(RELATIONS))
