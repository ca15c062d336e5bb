"""CIDEr-D over whole arrays: the numbers of pycocoevalcap's Cider at a fraction of its time and memory.

Training chooses a checkpoint by CIDEr after every epoch, and a full evaluation scores 40,504 captions;
pycocoevalcap walks through every n-gram in Python. tests/scores/test_cider.py holds the two equal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_Ints = NDArray[np.int64]
_Floats = NDArray[np.float64]

MAX_N = 4
SIGMA = 6.0
SCALE = 10.0


@dataclass(frozen=True)
class _Texts:
    """Captions as one run of token numbers; text t covers tokens[starts[t] : starts[t] + lengths[t]]."""

    tokens: _Ints
    text_of_token: _Ints
    lengths: _Ints


def cider_d(captions: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[float, list[float]]:
    """Return CIDEr-D of tokenised captions, over all images and for each.

    CIDEr-D = 10/m sum_j exp(-(l(c) - l(r_j))^2 / (2 sigma^2)) min(g(c), g(r_j)) . g(r_j) / (|g(c)| |g(r_j)|),
    averaged over n = 1..4, sigma = 6, g the tf-idf vector of n-grams (Vedantam et al. 2015, Eq. (1), (3) and
    Sec. 6); document frequencies come from `references`. As in the published code, the length l counts bigrams.

    Args:
        captions: one caption an image, tokens joined by spaces.
        references: the reference captions of each image, in the same order; none may be empty of references.

    Returns:
        Fractions: the mean over the images, and the value of each image.
    """
    num_images = len(captions)
    image_of_reference = np.repeat(np.arange(num_images), [len(texts) for texts in references])
    # Texts 0 .. num_images - 1 are the captions, the references follow.
    texts = _number([*captions, *(text for several in references for text in several)])
    image_of_text = np.concatenate([np.arange(num_images), image_of_reference])
    bigrams = np.maximum(texts.lengths - 1, 0)
    gap = (bigrams[:num_images][image_of_reference] - bigrams[num_images:]).astype(np.float64)
    penalty = np.exp(-(gap**2) / (2 * SIGMA**2))

    similarity = np.zeros(len(image_of_reference))
    grams = texts.tokens
    for n in range(1, MAX_N + 1):
        if n > 1:
            grams = _longer(grams, texts, n)
        similarity += _similarity(grams, texts, n, image_of_text, num_images) * penalty
    per_reference = similarity / MAX_N
    count = np.bincount(image_of_reference, minlength=num_images)
    each = SCALE * np.bincount(image_of_reference, weights=per_reference, minlength=num_images) / count
    return float(each.mean()), each.tolist()


def _number(texts: Sequence[str]) -> _Texts:
    numbers: dict[str, int] = {}
    tokens: list[int] = []
    lengths = np.empty(len(texts), dtype=np.int64)
    for at, text in enumerate(texts):
        words = text.split()
        lengths[at] = len(words)
        tokens.extend(numbers.setdefault(word, len(numbers)) for word in words)
    return _Texts(np.array(tokens, dtype=np.int64), np.repeat(np.arange(len(texts)), lengths), lengths)


def _starts(texts: _Texts, n: int) -> _Ints:
    """Return the positions at which an n-gram starts: those with n - 1 more tokens in the same text."""
    last = np.arange(len(texts.tokens)) + n - 1
    inside = last < len(texts.tokens)
    start = np.flatnonzero(inside)
    return start[texts.text_of_token[start] == texts.text_of_token[last[start]]]


def _longer(shorter: _Ints, texts: _Texts, n: int) -> _Ints:
    """Return the numbers of the n-grams by start position, from those of the (n - 1)-grams; -1 where there is none."""
    start = _starts(texts, n)
    vocabulary = int(texts.tokens.max(initial=0)) + 1
    # Numbered anew at every n: the product of two counts stays far below 2^63 for any corpus that fits in memory.
    pair = shorter[start] * vocabulary + texts.tokens[start + n - 1]
    grams = np.full(len(texts.tokens), -1, dtype=np.int64)
    grams[start] = np.unique(pair, return_inverse=True)[1]
    return grams


def _similarity(grams: _Ints, texts: _Texts, n: int, image_of_text: _Ints, num_images: int) -> _Floats:
    """Return the clipped cosine of every reference with its image's caption, for n-grams of one length."""
    num_texts = len(image_of_text)
    start = _starts(texts, n)
    if not len(start):
        return np.zeros(num_texts - num_images)
    num_grams = int(grams[start].max()) + 1
    entry, frequency = np.unique(texts.text_of_token[start] * num_grams + grams[start], return_counts=True)
    text, gram = np.divmod(entry, num_grams)
    image = image_of_text[text]
    of_reference = text >= num_images

    documents = np.unique(image[of_reference] * num_grams + gram[of_reference]) % num_grams
    document_frequency = np.bincount(documents, minlength=num_grams)
    idf = np.log(float(num_images)) - np.log(np.maximum(1.0, document_frequency))
    weight = frequency * idf[gram]
    norm = np.sqrt(np.bincount(text, weights=weight**2, minlength=num_texts))

    # Every entry of a reference meets the entry of its image's caption with the same n-gram, or nothing.
    wanted = image[of_reference] * num_grams + gram[of_reference]
    have, have_weight = entry[~of_reference], weight[~of_reference]
    reference_weight = weight[of_reference]
    if len(have):
        at = np.minimum(np.searchsorted(have, wanted), len(have) - 1)
        caption_weight = np.where(have[at] == wanted, have_weight[at], 0.0)
    else:
        caption_weight = np.zeros(len(wanted))
    overlap = np.bincount(
        text[of_reference] - num_images,
        weights=np.minimum(caption_weight, reference_weight) * reference_weight,
        minlength=num_texts - num_images,
    )
    norms = norm[:num_images][image_of_text[num_images:]] * norm[num_images:]
    return np.divide(overlap, norms, out=np.zeros(len(overlap)), where=norms > 0)
