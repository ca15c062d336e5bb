"""Stems of answers, as OK-VQA's annotations have them: plurals in the singular, -ing forms as the verb's base form.

OK-VQA compares stemmed answers: `racing` was typed (`raw_answer`), `race` is compared (`answer`). The published code
brings predictions to that form with a part-of-speech tagger, WordNet and a table of exceptions. These are rules of
English spelling in their place, which need no data; words they do not know stay as they are.
"""

from __future__ import annotations

import re
from functools import lru_cache

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
    """Return the answer with each of its words as a stem; case is kept where nothing changes.

    Args:
        answer: a prediction.
    """
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
