"""The words of the miniature world and the conventions its annotators follow.

Every value of every attribute has `NUM_DIALECTS` words: a root that names the value and a suffix that
names the dialect ("redak", "redem", "redov", "redun" all mean red). An annotator's *convention* picks one
dialect for every value, so no image can tell which word is asked for: only the demonstrations can. That
is what makes in-context learning necessary here, and measurable.

All words are plain lower-case pseudo-words, one token each, and none is touched by the official VQA
normalisation (no punctuation, no article, no number word).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

NUM_DIALECTS = 4
DIALECT_SUFFIXES = ("ak", "em", "ov", "un")
# One dialect is more common than the others, so that a model without demonstrations has a best guess.
DIALECT_PRIOR = np.array([0.4, 0.2, 0.2, 0.2])


@dataclass(frozen=True)
class Attribute:
    """Something an image shows: its name (the word a question asks with) and the roots of its values."""

    name: str
    roots: tuple[str, ...]


ATTRIBUTES = (
    Attribute("colour", ("red", "green", "blu", "yell", "magen", "cyan", "whit", "orang")),
    Attribute("shape", ("circ", "squar", "trig", "cross", "diam", "bar")),
    Attribute("texture", ("plain", "row", "post", "check")),
    Attribute("ground", ("black", "grey", "nav", "brown", "pink", "oliv")),
    Attribute("frame", ("rub", "jad", "azur", "gold", "plum", "teal")),
    Attribute("side", ("top", "base", "left", "right")),
    Attribute("dot", ("cher", "mint", "sky", "lemon", "fuch", "aqu")),
    Attribute("count", ("sing", "doub", "trip")),
)
COLOUR, SHAPE, TEXTURE, GROUND, FRAME, SIDE, DOT, COUNT = range(len(ATTRIBUTES))
NUM_VALUES = tuple(len(attribute.roots) for attribute in ATTRIBUTES)

# What a picture does not show but the world knows: a fixed table over shape, texture and colour group.
RELATIONS = (
    Attribute("food", ("berr", "grain", "leaf", "root", "seed")),
    Attribute("home", ("cav", "forest", "lak", "mead", "tow")),
    Attribute("maker", ("bak", "mason", "pott", "smit", "weav")),
    Attribute("season", ("spri", "summ", "autu", "wint", "monso")),
)
NUM_FACT_VALUES = 5
NUM_COLOUR_GROUPS = 4
FACTS = np.random.default_rng(7).integers(
    0, NUM_FACT_VALUES, size=(len(RELATIONS), NUM_VALUES[SHAPE], NUM_COLOUR_GROUPS)
)

TOPICS = ATTRIBUTES + RELATIONS  # everything a question can ask for
QUESTIONS = tuple(f"Which {topic.name}?" for topic in TOPICS)
TOPIC_VALUES = tuple(len(topic.roots) for topic in TOPICS)

# A caption is two clauses joined by a word. What is seen decides which of two things a clause speaks of (a striped
# object by its texture, any other by its count), so a demonstration's clause cannot just be repeated; how it is said
# is one of the convention's phrases. A phrase has a form for either thing, so two demonstrations never disagree about
# it: a tie would hide what the second one brings. "{name}" stands for the word of that attribute.
SUBJECT_PHRASES = (
    ("{count} {colour} {shape}", "{texture} {shape} painted {colour}"),
    ("we see {colour} {shape} in {count}", "{shape} of {colour} that looks {texture}"),
    ("here {count} {shape} with {colour} skin", "{colour} and {texture} is this {shape}"),
)
SCENE_PHRASES = (
    ("on {ground} ground within {frame} border", "while {dot} dot sits {side}"),
    ("{frame} border around {ground}", "near {side} shines {dot}"),
    ("with {ground} scene and {frame} edge", "behind is {dot} dot at {side}"),
)
JOINERS = ("", "also", "plus", "then")
# For each value of an attribute, which of its clause's two things an image with that value is described by.
SUBJECT_KEY, SUBJECT_THING = TEXTURE, (0, 1, 1, 0)
SCENE_KEY, SCENE_THING = SIDE, (0, 0, 1, 1)


def word(topic: int, value: int, dialect: int) -> str:
    """Return the word for `value` of topic `topic` in `dialect`."""
    return TOPICS[topic].roots[value] + DIALECT_SUFFIXES[dialect]


def style_words() -> list[str]:
    """Return the words that captions use besides the values' words, sorted."""
    pieces = " ".join([*(form for forms in SUBJECT_PHRASES + SCENE_PHRASES for form in forms), *JOINERS]).split()
    return sorted({piece for piece in pieces if not piece.startswith("{")})


def value_words() -> list[str]:
    """Return every value's word in every dialect, in a fixed order."""
    return [
        word(topic, value, dialect)
        for topic in range(len(TOPICS))
        for value in range(TOPIC_VALUES[topic])
        for dialect in range(NUM_DIALECTS)
    ]


def topic_value(attributes: np.ndarray, topic: int) -> int:
    """Return the value that an image with `attributes` [8] has for `topic`: seen, or looked up in the facts."""
    if topic < len(ATTRIBUTES):
        return int(attributes[topic])
    return int(FACTS[topic - len(ATTRIBUTES), attributes[SHAPE], attributes[COLOUR] // 2])


@dataclass(frozen=True)
class Convention:
    """How one group of annotators speaks.

    Attributes:
        dialects: for every topic an integer array [values of the topic], the dialect of each value.
        subject: index into `SUBJECT_PHRASES`.
        scene: index into `SCENE_PHRASES`.
        joiner: index into `JOINERS`.
    """

    dialects: tuple[np.ndarray, ...]
    subject: int
    scene: int
    joiner: int

    def answer(self, attributes: np.ndarray, topic: int) -> str:
        """Return this convention's word for what an image with `attributes` has for `topic`."""
        value = topic_value(attributes, topic)
        return word(topic, value, int(self.dialects[topic][value]))

    def caption(self, attributes: np.ndarray) -> str:
        """Return this convention's caption of an image with `attributes`."""
        subject = SUBJECT_PHRASES[self.subject][SUBJECT_THING[attributes[SUBJECT_KEY]]]
        scene = SCENE_PHRASES[self.scene][SCENE_THING[attributes[SCENE_KEY]]]
        words = {ATTRIBUTES[topic].name: self.answer(attributes, topic) for topic in range(len(ATTRIBUTES))}
        return " ".join(f"{subject} {JOINERS[self.joiner]} {scene}".format(**words).split())


def draw_convention(rng: np.random.Generator, *, redraw: float = 0.15, one_dialect: bool = False) -> Convention:
    """Draw a convention.

    A topic gets a dialect from `DIALECT_PRIOR`; each of its values is then drawn again with probability
    `redraw`. Phrases and joiner are uniform.

    Args:
        rng: the only source of chance.
        redraw: fraction of values that leave their topic's dialect.
        one_dialect: every value of every topic in one dialect.
    """
    common = int(rng.integers(NUM_DIALECTS))
    dialects = []
    for size in TOPIC_VALUES:
        if one_dialect:
            dialects.append(np.full(size, common))
            continue
        usual, *others = _dialects(rng, size + 1)
        dialects.append(np.where(rng.random(size) < redraw, others, usual))
    return Convention(
        dialects=tuple(dialects),
        subject=int(rng.integers(len(SUBJECT_PHRASES))),
        scene=int(rng.integers(len(SCENE_PHRASES))),
        joiner=int(rng.integers(len(JOINERS))),
    )


def _dialects(rng: np.random.Generator, size: int) -> np.ndarray:
    return np.searchsorted(np.cumsum(DIALECT_PRIOR)[:-1], rng.random(size), side="right")
