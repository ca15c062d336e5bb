"""Caption metrics: CIDEr-D, BLEU-1 to -4, METEOR, ROUGE-L and, where its models are, SPICE.

pycocoevalcap's programs throughout, but for CIDEr-D, which `pipeline.scores.cider` computes to the
same numbers in less time.
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
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.meteor import meteor
from pycocoevalcap.rouge.rouge import Rouge
from pycocoevalcap.spice import spice

from pipeline.core.errors import InputError, WorkError, nearest
from pipeline.scores.cider import cider_d
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
        if name not in _SCORER_OF:
            raise InputError(f"unknown caption metric '{name}'", way_out=nearest(name, _SCORER_OF))
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
