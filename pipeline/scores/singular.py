"""The singular of an English word as `pattern` forms it, mistakes included.

CHAIR's published numbers rest on `singularize` of the package pattern (clips/pattern, d25511f), which
does not install on a current Python. It turns "bus" into "bu", "glass" into "glas" and leaves
"cookies" alone; a better singular would count other objects and give other numbers. This module
gives the same answer for every lower-case word.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

_PREPOSITIONS = frozenset(
    """about above across after among around at athwart before behind below beneath beside besides between
    betwixt beyond but by during except for from in into near of off on onto out over since till to under
    until unto upon with""".split()  # noqa: SIM905
)

# A word that *ends* one of these stays as it is, so that "s", "out" and "ice" do too.
_UNCHANGED = tuple(
    """bison bream breeches britches carp chassis christmas clippers cod contretemps corps debris diabetes
    djinn eland elk flounder gallows georgia graffiti headquarters herpes high-jinks homework innings
    jackanapes mackerel measles mews mumps news pincers pliers proceedings rabies salmon scissors series
    shears species swine swiss trout tuna whiting wildebeest
    advice bread butter cheese electricity equipment fruit furniture garbage gravel happiness information
    ketchup knowledge love luggage mathematics mayonnaise meat mustard progress research rice sand software
    understanding water""".split()  # noqa: SIM905
)

# Plurals of words in -ie are recognised and then handed back as they came.
_PLURALS_KEPT = tuple(
    f"{word}s"
    for word in """alergie auntie beanie birdie bogie bombie collie cookie cutie doggie eyrie freebie goonie
    groupie hankie hippie hoagie hottie indie junkie laddie laramie lingerie meanie newbie nightie oldie
    pixie quickie reverie rookie softie sortie stoolie sweetie techie toughie valkyrie veggie weenie yuppie
    zombie""".split()  # noqa: SIM905
)

# Matched at the end of a word, so "women" gives "woman" and "four" gives "fmy".
_IRREGULAR = {
    "atlantes": "atlas", "atlases": "atlas", "axes": "axe", "beeves": "beef", "brethren": "brother",
    "children": "child", "corpora": "corpus", "corpuses": "corpus", "ephemerides": "ephemeris", "feet": "foot",
    "ganglia": "ganglion", "geese": "goose", "genera": "genus", "genii": "genie", "helves": "helve",
    "kine": "cow", "leaves": "leaf", "loaves": "loaf", "men": "man", "mongooses": "mongoose",
    "monies": "money", "moves": "move", "mythoi": "mythos", "numena": "numen", "occipita": "occiput",
    "octopodes": "octopus", "opera": "opus", "opuses": "opus", "our": "my", "oxen": "ox", "penes": "penis",
    "penises": "penis", "people": "person", "sexes": "sex", "soliloquies": "soliloquy", "teeth": "tooth",
    "testes": "testis", "trilbys": "trilby", "turves": "turf", "zoa": "zoon",
}  # fmt: skip


@dataclass(frozen=True)
class _Ending:
    """`old` becomes `new` where the letters before it allow it.

    Args:
        after: the stem must end in one of these; empty for any stem.
        not_after: the stem must end in a letter, and not in one of these.
        inside: the stem may not be empty.
    """

    old: str
    new: str
    after: tuple[str, ...] = ()
    not_after: str | None = None
    inside: bool = False

    def apply(self, word: str) -> str | None:
        if not word.endswith(self.old):
            return None
        stem = word[: len(word) - len(self.old)]
        if self.after and not stem.endswith(self.after):
            return None
        if self.not_after is not None and (not stem or stem[-1] in self.not_after):
            return None
        return None if self.inside and not stem else stem + self.new


def _letters(text: str) -> tuple[str, ...]:
    return tuple(text)


# The first that applies wins.
_ENDINGS = (
    _Ending("ae", "a", inside=True),
    _Ending("itis", "itis", inside=True),
    _Ending("eaux", "eau", inside=True),
    _Ending("quizzes", "quiz"),
    _Ending("matrices", "matrix"),
    _Ending("ices", "ex", after=("ap", "vert", "ind")),
    _Ending("es", "", after=("alias", "status")),
    # A character class meant as a choice of words: any of these letters before -i will do.
    _Ending("i", "us", after=_letters("octp|vir")),
    _Ending("es", "is", after=("cris", "ax", "test")),
    _Ending("shoes", "shoe"),
    _Ending("oes", "o"),
    _Ending("buses", "bus"),
    # The same slip again; it makes "police" a "polouse".
    _Ending("ice", "ouse", after=_letters("m|l")),
    _Ending("es", "", after=("x", "ch", "ss", "sh")),
    _Ending("movies", "movie"),
    _Ending("ombies", "ombie", inside=True),
    _Ending("series", "series"),
    _Ending("quies", "quy"),
    _Ending("ies", "y", not_after="aeiouy"),
    _Ending("ves", "f", after=("al", "el", "ol")),
    _Ending("eaves", "eaf", not_after="d"),
    _Ending("arves", "arf"),
    _Ending("erves", "erve"),
    _Ending("ves", "fe", after=("ni", "li", "wi")),
    _Ending("ves", "f", after=_letters("lr")),
    _Ending("ves", "ve", after=_letters("aeo")),
    _Ending("ves", "ve", after=("si", "ti", "hi")),
    _Ending("ves", "fe", not_after="f"),
    _Ending("ses", "sis", after=("analy", "ba", "diagno", "parenthe", "progno", "synop", "the")),
    _Ending("opses", "opsis", inside=True),
    _Ending("yses", "ysis", inside=True),
    _Ending("oses", "ose", after=("h", "d", "r", "o", "n", "b", "cl", "p")),
    _Ending("oses", "osis", inside=True),
    _Ending("a", "um", after=_letters("ti")),
    _Ending("news", "news"),
    _Ending("s", ""),
)


@lru_cache(maxsize=1 << 16)
def singular(word: str) -> str:
    """Return the singular of a token in lower case by pattern's rules."""
    parts = word.split("-")
    if len(parts) > 1 and parts[1] in _PREPOSITIONS:
        return "-".join([singular(parts[0]), *parts[1:]])
    if word.endswith("'"):
        # The plural's genitive (dogs') becomes the singular's (dog's).
        bare = word.rstrip("'")
        return singular(bare) + "'s" * (len(word) - len(bare))
    if any(kept.endswith(word) for kept in _UNCHANGED) or word.endswith(_PLURALS_KEPT):
        return word
    for plural, single in _IRREGULAR.items():
        if word.endswith(plural):
            return word[: len(word) - len(plural)] + single
    if word.startswith("oxen"):
        return "ox" + word[len("oxen") :]
    for ending in _ENDINGS:
        changed = ending.apply(word)
        if changed is not None:
            return changed
    return word
