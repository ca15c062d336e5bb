"""Caption metrics: CIDEr-D, BLEU-1 to -4, METEOR, ROUGE-L and, where its models are, SPICE.

pycocoevalcap's programs throughout, but for CIDEr-D: the same numbers, computed over whole arrays at a fraction of its
time and memory.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.meteor import meteor
from pycocoevalcap.rouge.rouge import Rouge
from pycocoevalcap.spice import spice

from pipeline.core.errors import InputError, WorkError, require_known
from pipeline.scores.files import JsonObject, first_few
from pipeline.scores.java import conversation, run_java, tokenise, tokenise_references

_Key = TypeVar("_Key", bound=Hashable)
_Texts = dict[int, list[str]]
_Numbers = dict[str, tuple[float, list[float]]]

_BLEU_ORDERS = 4
_PARAPHRASES = "data/paraphrase-en.gz"  # beside METEOR's jar


@dataclass(frozen=True)
class CaptionScore:
    """Caption metrics as fractions (1.25 is a CIDEr of 125), over all images and for each."""

    overall: dict[str, float]
    per_image: dict[Any, dict[str, float]]

    def as_dict(self) -> JsonObject:
        """Return the numbers as plain JSON values, ids as text."""
        return {**self.overall, "per_image": {str(key): dict(value) for key, value in self.per_image.items()}}


def _cider(references: _Texts, captions: _Texts) -> _Numbers:
    return {"CIDEr": cider_d([captions[key][0] for key in captions], [references[key] for key in captions])}


def _bleu(references: _Texts, captions: _Texts) -> _Numbers:
    overall, each = Bleu(_BLEU_ORDERS).compute_score(references, captions, verbose=0)
    return {f"Bleu_{n + 1}": (float(overall[n]), [float(v) for v in each[n]]) for n in range(_BLEU_ORDERS)}


def _rouge(references: _Texts, captions: _Texts) -> _Numbers:
    overall, each = Rouge().compute_score(references, captions)
    return {"ROUGE_L": (float(overall), [float(value) for value in each])}


def _meteor(references: _Texts, captions: _Texts) -> _Numbers:
    """METEOR 1.5 by its line protocol, called as pycocoevalcap calls it."""
    # "|||" separates the fields of the protocol. The table is named, because METEOR does not find its own below a
    # folder whose name a URL would write in another way.
    command = ["-Xmx2G", "-jar", meteor.METEOR_JAR, "-", "-", "-stdio", "-l", "en", "-norm", "-a", _PARAPHRASES]
    with conversation(command, folder=Path(meteor.__file__).parent) as program:
        statistics = []
        for key, (caption,) in captions.items():
            texts = [text.replace("|||", " ") for text in (*references[key], caption)]
            texts[-1] = texts[-1].replace("  ", " ")
            statistics += program.ask(" ||| ".join(("SCORE", *texts)))
        answers = program.ask(" ||| ".join(("EVAL", *statistics)), answers=len(captions) + 1)
    try:
        *each, overall = (float(answer) for answer in answers)
    except ValueError as error:
        raise WorkError(f"METEOR answered something else than numbers ({error})", where=meteor.METEOR_JAR) from None
    return {"METEOR": (overall, each)}


def _spice(references: _Texts, captions: _Texts) -> _Numbers:
    """SPICE, called as pycocoevalcap calls it."""
    home = Path(spice.__file__).parent
    (home / spice.CACHE_DIR).mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        given, out = Path(folder) / "captions.json", Path(folder) / "scores.json"
        rows = [{"image_id": key, "test": text, "refs": references[key]} for key, (text,) in captions.items()]
        given.write_text(json.dumps(rows), encoding="utf-8")
        command = ["-Xmx8G", "-jar", spice.SPICE_JAR, str(given), "-cache", spice.CACHE_DIR, "-out", str(out)]
        run_java([*command, "-subset", "-silent"], "", folder=home)
        scores = {row["image_id"]: row["scores"]["All"]["f"] for row in json.loads(out.read_text(encoding="utf-8"))}
    each = [float("nan") if scores[key] is None else float(scores[key]) for key in captions]
    return {"SPICE": (float(np.mean(each)), each)}


_Scorer = Callable[[_Texts, _Texts], _Numbers]
_SCORER_OF: dict[str, _Scorer] = {
    "CIDEr": _cider,
    **{f"Bleu_{n + 1}": _bleu for n in range(_BLEU_ORDERS)},
    "METEOR": _meteor,
    "ROUGE_L": _rouge,
    "SPICE": _spice,
}
METRICS = tuple(name for name in _SCORER_OF if name != "SPICE")


def spice_missing() -> str | None:
    """Return what SPICE lacks on this machine, or None where it can be scored."""
    library = Path(spice.__file__).parent / "lib"
    lacking = [
        name
        for name in ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")
        if not (library / name).is_file()
    ]
    return f"its CoreNLP models are not at hand ({', '.join(lacking)} in {library})" if lacking else None


def caption_scores(
    predictions: Mapping[_Key, str],
    references: Mapping[_Key, Sequence[str]],
    metrics: Sequence[str] = METRICS,
) -> CaptionScore:
    """Return the caption metrics of the predictions, with PTB tokens on both sides.

    CIDEr-D is Eq. (3) of Vedantam et al. 2015 with n = 1..4 and sigma = 6. Its document frequencies
    come from the references of the scored images alone, so one image scores 0 and a part of a set
    scores differently from the whole: gather all shards before scoring.

    Args:
        predictions: {image id: caption}; exactly these images are scored, tokenised in this order.
        references: {image id: reference captions}; may hold more images.
        metrics: names out of METRICS, and "SPICE" where `spice_missing()` is None.

    Returns:
        Fractions, overall and for each image.

    Raises:
        InputError: nothing to score, an image without reference, an unknown metric, SPICE without its models.
        WorkError: Java is missing or failed.
    """
    for name in metrics:
        require_known("caption metric", name, _SCORER_OF)
    scorers = list(dict.fromkeys(_SCORER_OF[name] for name in metrics))
    if _spice in scorers and spice_missing():
        raise InputError(f"SPICE cannot be scored: {spice_missing()}", way_out="Leave SPICE out of the metrics")
    ids = list(predictions)
    token_references, token_captions = _tokens(ids, predictions, references)
    numbers: _Numbers = {}
    for scorer in scorers:
        numbers.update(scorer(token_references, token_captions))
    return CaptionScore(
        overall={name: numbers[name][0] for name in metrics},
        per_image={key: {name: numbers[name][1][at] for name in metrics} for at, key in enumerate(ids)},
    )


def _tokens(
    ids: Sequence[_Key], predictions: Mapping[_Key, str], references: Mapping[_Key, Sequence[str]]
) -> tuple[_Texts, _Texts]:
    if not ids:
        raise InputError("there is no caption to score", way_out="Give at least one prediction")
    bare = [key for key in ids if not references.get(key)]
    if bare:
        way_out = "Give the caption file of the same split, or drop these images"
        raise InputError(f"images without reference caption ({first_few(bare)})", way_out=way_out)
    tokens = iter(tokenise_references(tuple(text for key in ids for text in references[key])))
    # Numbers instead of the caller's ids: SPICE sorts them.
    token_references = {at: list(islice(tokens, len(references[key]))) for at, key in enumerate(ids)}
    if not any(any(texts) for texts in token_references.values()):
        raise InputError("no reference caption holds a word", way_out="Check the caption file")
    captions = tokenise([predictions[key] for key in ids])
    return token_references, {at: [caption] for at, caption in enumerate(captions)}


_Ints = NDArray[np.int64]
_Floats = NDArray[np.float64]

MAX_N = 4
SIGMA = 6.0
SCALE = 10.0


@dataclass(frozen=True)
class _Encoded:
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


def _number(texts: Sequence[str]) -> _Encoded:
    numbers: dict[str, int] = {}
    tokens: list[int] = []
    lengths = np.empty(len(texts), dtype=np.int64)
    for at, text in enumerate(texts):
        words = text.split()
        lengths[at] = len(words)
        tokens.extend(numbers.setdefault(word, len(numbers)) for word in words)
    return _Encoded(np.array(tokens, dtype=np.int64), np.repeat(np.arange(len(texts)), lengths), lengths)


def _starts(texts: _Encoded, n: int) -> _Ints:
    """Return the positions at which an n-gram starts: those with n - 1 more tokens in the same text."""
    last = np.arange(len(texts.tokens)) + n - 1
    inside = last < len(texts.tokens)
    start = np.flatnonzero(inside)
    return start[texts.text_of_token[start] == texts.text_of_token[last[start]]]


def _longer(shorter: _Ints, texts: _Encoded, n: int) -> _Ints:
    """Return the numbers of the n-grams by start position, from those of the (n - 1)-grams; -1 where there is none."""
    start = _starts(texts, n)
    vocabulary = int(texts.tokens.max(initial=0)) + 1
    # Numbered anew at every n: the product of two counts stays far below 2^63 for any corpus that fits in memory.
    pair = shorter[start] * vocabulary + texts.tokens[start + n - 1]
    grams = np.full(len(texts.tokens), -1, dtype=np.int64)
    grams[start] = np.unique(pair, return_inverse=True)[1]
    return grams


def _similarity(grams: _Ints, texts: _Encoded, n: int, image_of_text: _Ints, num_images: int) -> _Floats:
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
