"""VQA accuracy, with the two normalisations in use, and the stems that OK-VQA compares.

Antol et al. 2015 (VQA) and the evaluation code published with VQA v2: an answer counts in full when
at least three of the other annotators gave it.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, TypeVar

from pipeline.core.errors import InputError, require_known
from pipeline.scores.files import JsonObject, first_few

_Key = TypeVar("_Key", bound=Hashable)

NORMALISATIONS = ("always", "official")
MATCHES_FOR_FULL_MARKS = 3

_MARKS = frozenset(';/[]"{}()=+\\_-><@`,?!')
_DIGIT_COMMA_DIGIT = re.compile(r"\d,\d")
_PERIOD_BEFORE_NO_DIGIT = re.compile(r"\.(?!\d)")
# The official code hands re.UNICODE (32) to `sub` where `count` stands, so the 33rd period of a text survives.
_PERIODS_REMOVED = 32
_ARTICLES = frozenset(("a", "an", "the"))
_DIGITS = {
    word: str(number)
    for number, word in enumerate("zero one two three four five six seven eight nine ten".split())  # noqa: SIM905
} | {"none": "0"}

# Each form is also met with one of its apostrophes left out ("couldnt've", "couldn'tve"); those are put back.
_CONTRACTED = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't
he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't
must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've
somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've
something'll that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas
wasn't we'd've we've weren't what'll what're what's what've when's where'd where's where've who'd who'd've
who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've
you'd you'd've you'll you're you've
""".split()  # noqa: SIM905


def _without_one_apostrophe(form: str) -> list[str]:
    return [form[:at] + form[at + 1 :] for at, letter in enumerate(form) if letter == "'"]


_CONTRACTIONS = {short: form for form in _CONTRACTED for short in _without_one_apostrophe(form)}
# The published table turns this one the other way round.
_CONTRACTIONS["somebody'd"] = "somebodyd"


@dataclass(frozen=True)
class VqaScore:
    """VQA accuracy of a set of answers, every number in percent and unrounded."""

    overall: float
    per_question: dict[Any, float]
    normalise: str
    per_answer_type: dict[str, float] = field(default_factory=dict)
    per_question_type: dict[str, float] = field(default_factory=dict)

    @property
    def num_questions(self) -> int:
        """Return how many questions were scored."""
        return len(self.per_question)

    def as_dict(self) -> JsonObject:
        """Return the numbers as plain JSON values, ids as text."""
        return {
            "overall": self.overall,
            "per_question": {str(key): value for key, value in self.per_question.items()},
            "per_answer_type": dict(self.per_answer_type),
            "per_question_type": dict(self.per_question_type),
            "normalise": self.normalise,
            "num_questions": self.num_questions,
        }


def clean_answer(text: str) -> str:
    """Return the answer on one line, without the white space around it: done under both normalisations."""
    return text.replace("\n", " ").replace("\t", " ").strip()


def strip_punctuation(text: str) -> str:
    """Return the text without punctuation, by the official rule.

    A mark is deleted where it touches a space somewhere in the text, or where the text holds
    digit,digit; otherwise it becomes a space. A period stays only before a digit. Apostrophe,
    colon, ampersand, dollar and per cent stay.
    """
    marks = _MARKS.intersection(text)
    if marks:
        deletes_all = _DIGIT_COMMA_DIGIT.search(text) is not None
        text = text.translate(
            {ord(mark): "" if deletes_all or f"{mark} " in text or f" {mark}" in text else " " for mark in marks}
        )
    return _PERIOD_BEFORE_NO_DIGIT.sub("", text, count=_PERIODS_REMOVED) if "." in text else text


def normalise_words(text: str) -> str:
    """Return the text in lower case, number words as digits, articles dropped, contractions mended."""
    words = (_DIGITS.get(word, word) for word in text.lower().split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


@lru_cache(maxsize=1 << 17)
def normalise_answer(text: str) -> str:
    """Return the answer in the form in which VQA accuracy compares answers.

    Source: the evaluation code published with VQA v2 (processPunctuation, then processDigitArticle).
    """
    return normalise_words(strip_punctuation(clean_answer(text)))


def vqa_accuracy(
    predictions: Mapping[_Key, str],
    references: Mapping[_Key, Sequence[str]],
    normalise: str = "always",
    *,
    answer_types: Mapping[_Key, str] | None = None,
    question_types: Mapping[_Key, str] | None = None,
) -> VqaScore:
    """Return the VQA accuracy of the predictions.

    Accuracy of one question = mean over the annotators i of min(1, matches among the others / 3), the
    leave-one-out form of the official code (Antol et al. 2015, and visualqa.org/evaluation).

    Args:
        predictions: {question id: answer}; exactly these questions are scored.
        references: {question id: answers of the annotators, ten in the official files}; may hold more questions.
        normalise: "always" (MimIC's scorer, the papers' figures) or "official" (normalised only where the
            annotators do not all agree; elsewhere strings are compared as they stand).
        answer_types: {question id: type}, for the means per answer type.
        question_types: {question id: type}, for the means per question type.

    Returns:
        Percent, overall and for every question.

    Raises:
        InputError: nothing to score, a question without annotation, or an unknown normalisation.
    """
    require_known("normalisation", normalise, NORMALISATIONS)
    if not predictions:
        raise InputError("there is no answer to score", way_out="Give at least one prediction")
    unannotated = [key for key in predictions if not references.get(key)]
    if unannotated:
        way_out = "Give the annotation file of the same split, or drop these answers"
        raise InputError(f"questions without annotation ({first_few(unannotated)})", way_out=way_out)
    compare = {"always": _matches_always, "official": _matches_official}[normalise]
    per_question = {
        key: _leave_one_out(compare(answer, references[key]), len(references[key]))
        for key, answer in predictions.items()
    }
    return VqaScore(
        overall=sum(per_question.values()) / len(per_question),
        per_question=per_question,
        normalise=normalise,
        per_answer_type=_means(per_question, answer_types),
        per_question_type=_means(per_question, question_types),
    )


def _matches_always(answer: str, references: Sequence[str]) -> int:
    target = normalise_answer(answer)
    return sum(normalise_answer(reference) == target for reference in references)


def _matches_official(answer: str, references: Sequence[str]) -> int:
    cleaned = [clean_answer(reference) for reference in references]
    if len(set(cleaned)) > 1:
        return _matches_always(answer, cleaned)
    return cleaned.count(clean_answer(answer))


def _leave_one_out(matches: int, annotators: int) -> float:
    # Left out: one of the matching annotators (matches - 1 remain) or one of the others (all remain).
    # Whole numbers until the last division keep 60 % at 60.0.
    full = MATCHES_FOR_FULL_MARKS
    marks = matches * min(full, matches - 1) + (annotators - matches) * min(full, matches)
    return 100.0 * marks / (full * annotators)


def _means(scores: Mapping[_Key, float], types: Mapping[_Key, str] | None) -> dict[str, float]:
    if types is None:
        return {}
    by_type: dict[str, list[float]] = defaultdict(list)
    for key, score in scores.items():
        if key in types:
            by_type[types[key]].append(score)
    return {name: sum(members) / len(members) for name, members in sorted(by_type.items())}


# OK-VQA compares stemmed answers: `racing` was typed (`raw_answer`), `race` is compared (`answer`). The published code
# brings predictions to that form with a part-of-speech tagger, WordNet and a table of exceptions. These are rules of
# English spelling in their place, which need no data; words they do not know stay as they are: plurals in the singular,
# -ing forms as the verb's base form.
_VOWELS = "aeiouy"

_IRREGULAR = {
    "men": "man", "women": "woman", "children": "child", "feet": "foot", "teeth": "tooth", "geese": "goose",
    "mice": "mouse", "oxen": "ox", "leaves": "leaf", "loaves": "loaf", "hooves": "hoof", "scarves": "scarf",
    "knives": "knife", "lives": "life",
    "wives": "wife", "wolves": "wolf", "halves": "half", "calves": "calf", "shelves": "shelf", "elves": "elf",
    "thieves": "thief", "bookshelves": "bookshelf",
    "dying": "die", "lying": "lie", "tying": "tie", "having": "have", "giving": "give", "living": "live",
    "tasting": "taste", "wasting": "waste", "pasting": "paste", "changing": "change", "arranging": "arrange",
    "lounging": "lounge", "plunging": "plunge", "exciting": "excite", "inviting": "invite", "buses": "bus",
    "gases": "gas", "lenses": "lens", "canvases": "canvas", "shoes": "shoe", "toes": "toe", "canoes": "canoe",
    "horseshoes": "horseshoe", "snowshoes": "snowshoe", "competing": "compete", "axes": "axe",
}  # fmt: skip
# Singular, though they end in s.
_KEPT = frozenset(
    """yes is was has his this us gas lens christmas texas las kansas arkansas paris series species news always
    perhaps james mars canvas atlas alas asparagus athens cosmos chaos thermos pancreas dallas vegas swiss""".split()  # noqa: SIM905
)
_NO_PLURAL_ENDINGS = ("ss", "us", "is", "'s")
_IE_NOUNS = ("movie", "cookie", "zombie", "hoodie", "smoothie", "brownie", "selfie", "pie", "tie", "lie", "veggie",
             "doggie", "genie", "prairie", "calorie", "foodie", "yankee")  # fmt: skip
# Nouns that end in -ing: no form of a verb, or read as a noun where they stand alone.
_ING_NOUNS = frozenset(
    """building ceiling clothing morning evening wedding railing pudding nothing something anything everything
    lightning sibling darling herring earring stocking frosting icing dressing stuffing topping awning duckling
    sterling shilling inning viking gosling dumpling offspring hamstring shoestring drawstring""".split()  # noqa: SIM905
)
_DOUBLED = re.compile(r"(bb|dd|gg|mm|nn|pp|rr|tt)$")
# A stem that lost an e: it ends so, or is one syllable with one vowel before one consonant (rid-, bak-).
_LOST_E = re.compile(r"([^s]s|c|v|z(?<!zz)|dg|rg|u|[bcdfgkpstz]l|[^aeiouy][aiu]t(?<![ns]it)|ur)$")
_SHORT = re.compile(r"^[^aeiouy]*[aeiouy][^aeiouywx]$|^[^aeiouy]*qu[aeiouy][^aeiouywx]$")


def stem_answer(answer: str) -> str:
    """Return a prediction with each of its words as a stem; case is kept where nothing changes."""
    return " ".join(_stem(word) for word in answer.split())


@lru_cache(maxsize=1 << 16)
def _stem(word: str) -> str:
    lower = word.lower()
    if not lower.isalpha():
        return word
    changed = _base(_singular(lower))
    return word if changed == lower else changed


# Not `singular.singular`: that one repeats the mistakes on which CHAIR's numbers rest ("bus" gives "bu", "cookies"
# stays), and OK-VQA's annotators' words were brought to the singular by another program, which makes none of them.
def _singular(word: str) -> str:
    if word in _IRREGULAR:
        return _IRREGULAR[word]
    if not word.endswith("s") or len(word) < 4 or word in _KEPT or word.endswith(_NO_PLURAL_ENDINGS):
        return word
    if word.endswith("ies"):
        return word[:-1] if word[:-1].endswith(_IE_NOUNS) else word[:-3] + "y"
    if word.endswith(("ches", "shes", "xes", "sses", "zzes", "oes")):
        return word[:-2]
    return word[:-1]


def _base(word: str) -> str:
    if word in _IRREGULAR:
        return _IRREGULAR[word]
    stem = word.removesuffix("ing")
    if stem == word or word in _ING_NOUNS or len(stem) < 2 or not any(letter in _VOWELS for letter in stem):
        return word
    if _DOUBLED.search(stem):
        return stem[:-1]
    return stem + "e" if _LOST_E.search(stem) or _SHORT.match(stem) else stem
