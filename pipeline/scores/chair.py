"""CHAIR: how often a caption names an object that its image does not hold.

Rohrbach et al. 2018 (Object Hallucination in Image Captioning), in the variant published with the
paper: words are made singular by `pattern`'s rules, two-word names are joined after that, and an
object counts as present if it is annotated as an instance or named in a reference caption.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, TypeVar

from pipeline.core.errors import InputError, nearest
from pipeline.core.files import stamp
from pipeline.scores.files import JsonObject, id_field, need, printable, read_json, record_list, text_field
from pipeline.scores.singular import singular

_Key = TypeVar("_Key", bound=Hashable)

VARIANT = "original (pattern's singular forms)"
_SYNONYMS_FILE = Path(__file__).with_name("data") / "chair_synonyms.txt"
# What names the miniature's objects, whose words are not English; the format is that of CHAIR's own list.
MINIATURE_WORDS = Path(__file__).with_name("data") / "miniature_synonyms.txt"

_WORD = re.compile(r"[^\W_]+(?:[-'][^\W_]+)*")
_PLAIN = re.compile(r"[a-z ]*[a-z]\.? *")
_SPLIT_WORDS = re.compile("cannot|gimme|gonna|gotta|lemme|wanna")  # NLTK makes two words of each
_TWO_WORD_NAMES = (
    "motor bike", "motor cycle", "air plane", "traffic light", "street light", "traffic signal", "stop light",
    "fire hydrant", "stop sign", "parking meter", "suit case", "sports ball", "baseball bat", "baseball glove",
    "tennis racket", "wine glass", "hot dog", "cell phone", "mobile phone", "teddy bear", "hair drier",
    "potted plant", "laptop computer", "stove top oven", "home plate", "train track",
)  # fmt: skip
_ANIMALS = "bird cat dog horse sheep cow elephant bear zebra giraffe animal cub".split()  # noqa: SIM905
# "baby bird" and "passenger train" hold no person; "wine glas" is what two wine glasses become.
_JOINED = (
    {name: name for name in _TWO_WORD_NAMES}
    | {f"{young} {animal}": animal for animal in _ANIMALS for young in ("baby", "adult")}
    | {f"passenger {vehicle}": vehicle for vehicle in ("jet", "train")}
    | {"bow tie": "tie", "toilet seat": "toilet", "wine glas": "wine glass"}
)

# NLTK's trained sentence splitter is a download; in lower-case captions its training only tells apart
# the periods of abbreviations, none of which is an object's name.
_ABBREVIATIONS = frozenset(
    """a.m ave bros capt co col corp d.c dept dr e.g ft gen gov i.e inc jr lt ltd mr mrs ms p.m prof rep rev
    sen sgt sr st u.k u.n u.s vs""".split()  # noqa: SIM905
)


@dataclass(frozen=True)
class CaptionObjects:
    """The objects that a caption names."""

    words: list[str]
    """as written, in the singular"""
    nodes: list[str]
    """the COCO category of each word"""
    indices: list[int]
    """where each word stands among the tokens before two-word names are joined"""
    tokens: list[str]
    """all tokens, after singular forms and joined two-word names"""


@dataclass(frozen=True)
class ChairSentence:
    """CHAIR of one caption."""

    image_id: Any
    mscoco_generated_words: list[str]
    mscoco_hallucinated_words: list[list[str]]
    mscoco_gt_words: list[str]
    CHAIRs: int
    CHAIRi: float


@dataclass(frozen=True)
class ChairScore:
    """CHAIR of a set of captions, as fractions."""

    CHAIRs: float
    CHAIRi: float
    recall: float
    n_captions: int
    sentences: list[ChairSentence]
    variant: str = VARIANT

    def as_dict(self) -> JsonObject:
        """Return the numbers as plain JSON values."""
        return asdict(self)


@cache
def synonyms(file: Path = _SYNONYMS_FILE) -> Mapping[str, str]:
    """Return {word: category}, by default for COCO's 80 categories and their synonyms.

    Source: synonyms.txt, published with the paper (LisaAnne/Hallucination, 6e4d33c4), its stray spaces
    kept: " motor bike" never matches, and no published number counts it.

    Args:
        file: a category a line, its name first, then its synonyms, between ", ".
    """
    nodes: dict[str, str] = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        names = line.strip().split(", ")
        nodes.update((name, names[0]) for name in names)
    return nodes


@cache
def _tokenisers() -> tuple[Any, Any]:
    from nltk.tokenize.destructive import NLTKWordTokenizer  # seconds to import, and the command line needs none
    from nltk.tokenize.punkt import PunktParameters, PunktSentenceTokenizer

    parameters = PunktParameters()
    parameters.abbrev_types = set(_ABBREVIATIONS)
    return PunktSentenceTokenizer(parameters), NLTKWordTokenizer()


def caption_objects(caption: str, words: Mapping[str, str] | None = None) -> CaptionObjects:
    """Return the objects that a caption names.

    Args:
        caption: raw text; case does not count.
        words: {word: category}; None for COCO's, as in `synonyms`.
    """
    return _objects(_singulars(caption), words)


def _singulars(caption: str) -> tuple[str, ...]:
    text = caption.lower()
    if _PLAIN.fullmatch(text) and not _SPLIT_WORDS.search(text):
        # one sentence of plain words: what NLTK makes of it is known, and nine captions in ten are so
        return tuple(map(singular, text.replace(".", " .").split()))
    sentences, words_of = _tokenisers()
    return tuple(singular(word) for sentence in sentences.tokenize(text) for word in words_of.tokenize(sentence))


def _objects(singulars: Sequence[str], words: Mapping[str, str] | None) -> CaptionObjects:
    tokens, starts = _join(singulars)
    nodes = synonyms() if words is None else words
    # A toilet's seat is no chair.
    skipped = "seat" if "toilet" in tokens else None
    named = [(token, start) for token, start in zip(tokens, starts, strict=True) if token in nodes and token != skipped]
    return CaptionObjects(
        words=[word for word, _ in named],
        nodes=[nodes[word] for word, _ in named],
        indices=[start for _, start in named],
        tokens=tokens,
    )


@lru_cache(maxsize=4)
def _of_references(words: tuple[tuple[str, str], ...] | None) -> Callable[[str], tuple[str, ...]]:
    """Return what gives a reference caption's categories, each once, and remembers them.

    Every trial of a task is scored against the same references, five for each generated caption.
    """
    known = None if words is None else dict(words)

    @lru_cache(maxsize=1 << 18)
    def nodes(caption: str) -> tuple[str, ...]:
        return tuple(dict.fromkeys(_objects(_singulars(caption), known).nodes))

    return nodes


def _join(words: Sequence[str]) -> tuple[list[str], list[int]]:
    joined, starts, at = [], [], 0
    while at < len(words):
        pair = " ".join(words[at : at + 2])
        joined.append(_JOINED.get(pair, words[at]))
        starts.append(at)
        at += 2 if pair in _JOINED else 1
    return joined, starts


def mentions(caption: str, words: Collection[str]) -> list[tuple[int, int]]:
    """Return where a caption names one of `words` (as `CaptionObjects.words` has them), as spans of characters."""
    if not words:
        return []
    words_found = list(_WORD.finditer(caption))
    singulars = [singular(match.group().lower()) for match in words_found]
    joined, starts = _join(singulars)
    ends = [*(start - 1 for start in starts[1:]), len(words_found) - 1]
    return [
        (words_found[start].start(), words_found[end].end())
        for name, start, end in zip(joined, starts, ends, strict=True)
        if name in words
    ]


def category(name: str, where: str, words: Mapping[str, str] | None = None) -> str:
    """Return the category that `name` stands for; `words` as in `caption_objects`.

    Raises:
        InputError: the name is none of the known categories and synonyms; `where` says where it stood.
    """
    known = synonyms() if words is None else words
    try:
        return known[name]
    except KeyError:
        raise InputError(f"unknown object '{name}'", where=where, way_out=nearest(name, set(known.values()))) from None


def categories_of(paths: Iterable[str | Path]) -> dict[str, list[str]]:
    """Return {image id: names of its instances' categories}; an image without instance has an empty list.

    Raises:
        InputError: a file is missing, damaged or of another shape.
    """
    categories: dict[str, list[str]] = {}
    for path in map(Path, paths):
        for key, names in _categories(path, _stamp(path)).items():
            categories.setdefault(key, []).extend(names)
    return categories


def _stamp(path: Path) -> tuple[int, ...]:
    try:
        return stamp(path)
    except OSError:
        return ()  # reading it says what is wrong


# A process scores many trials against the same file, and COCO's takes seconds to read; a replaced file is read again.
@lru_cache(maxsize=2)
def _categories(path: Path, mark: tuple[int, ...]) -> Mapping[str, tuple[str, ...]]:
    del mark
    content = read_json(path)
    names = {
        id_field(row, "id", f"{path}, category {number}"): text_field(row, "name", f"{path}, category {number}")
        for number, row in enumerate(record_list(content, "categories", str(path)))
    }
    categories_by_image: dict[str, list[str]] = {
        id_field(row, "id", f"{path}, image {number}"): []
        for number, row in enumerate(record_list(content, "images", str(path)))
    }
    for number, row in enumerate(record_list(content, "annotations", str(path))):
        place = f"{path}, annotation {number}"
        category = id_field(row, "category_id", place)
        if category not in names:
            raise InputError(
                f"category_id {printable(category)} is not among the categories", where=place, way_out="Correct it"
            )
        categories_by_image.setdefault(id_field(row, "image_id", place), []).append(names[category])
    # CHAIR asks only which categories are there: the repeats would be most of what the cache holds.
    return {key: tuple(dict.fromkeys(categories)) for key, categories in categories_by_image.items()}


def ground_truth(
    categories: Mapping[_Key, Iterable[str]],
    captions: Mapping[_Key, Iterable[str]],
    words: Mapping[str, str] | None = None,
) -> dict[_Key, set[str]]:
    """Return {image id: objects present}: the annotated categories and the objects named in reference captions.

    Args:
        categories: {image id: names of its instances' categories}.
        captions: {image id: its reference captions}.
        words: {word: category}; None for COCO's, as in `synonyms`.

    Raises:
        InputError: a category that CHAIR does not know.
    """
    present = {key: {category(name, f"image {key}", words) for name in names} for key, names in categories.items()}
    nodes_of = _of_references(None if words is None else tuple(words.items()))
    for key, texts in captions.items():
        present.setdefault(key, set()).update(node for text in texts for node in nodes_of(text))
    return present


def chair_scores(
    captions: Mapping[_Key, str], objects: Mapping[_Key, Collection[str]], words: Mapping[str, str] | None = None
) -> ChairScore:
    """Return CHAIR_s, CHAIR_i and the recall of objects.

    CHAIR_i = hallucinated object mentions / all object mentions, CHAIR_s = captions with a hallucinated
    object / all captions (Rohrbach et al. 2018, Sec. 2.1); every mention counts, repeats too. Recall =
    distinct present objects that are mentioned / distinct present objects, over all captions.

    Args:
        captions: {image id: generated caption}.
        objects: {image id: COCO categories present}, as `ground_truth` returns them; may hold more images.
        words: {word: category}; None for COCO's, as in `synonyms`.

    Returns:
        Fractions; a ratio over nothing (no object mentioned, none present) is 0.

    Raises:
        InputError: no caption, or an image without ground truth.
    """
    if not captions:
        raise InputError("there is no caption to score", way_out="Give at least one caption")
    way_out = "Give the annotations of the same split, or drop these captions"
    need(captions, objects, "ground-truth objects", way_out=way_out)
    sentences, recalled, present = [], 0, 0
    for key, caption in captions.items():
        named, truth = caption_objects(caption, words), set(objects[key])
        wrong = [[word, node] for word, node in zip(named.words, named.nodes, strict=True) if node not in truth]
        recalled += len(truth & set(named.nodes))
        present += len(truth)
        sentences.append(
            ChairSentence(
                image_id=key,
                mscoco_generated_words=named.nodes,
                mscoco_hallucinated_words=wrong,
                mscoco_gt_words=sorted(truth),
                CHAIRs=int(bool(wrong)),
                CHAIRi=_ratio(len(wrong), len(named.nodes)),
            )
        )
    mentions = sum(len(sentence.mscoco_generated_words) for sentence in sentences)
    return ChairScore(
        CHAIRs=_ratio(sum(sentence.CHAIRs for sentence in sentences), len(sentences)),
        CHAIRi=_ratio(sum(len(sentence.mscoco_hallucinated_words) for sentence in sentences), mentions),
        recall=_ratio(recalled, present),
        n_captions=len(sentences),
        sentences=sentences,
    )


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else 0.0
