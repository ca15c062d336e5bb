"""The words of the miniature world, the conventions its annotators follow, and the annotators, who not always do.

Every value of every attribute has `NUM_DIALECTS` words: a root that names the value and a suffix that
names the dialect ("redak", "redem", "redov", "redun" all mean red). An annotator's *convention* picks one
dialect for every value, so no image can tell which word is asked for: only the demonstrations can. That
is what makes in-context learning necessary here, and measurable.

All words are plain lower-case pseudo-words, one token each, and none is touched by the official VQA
normalisation (no punctuation, no article, no number word).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

NUM_DIALECTS = 4
DIALECT_SUFFIXES = ("ak", "em", "ov", "un")
# One dialect is more common than the others, so that a model without demonstrations has a best guess.
DIALECT_PRIOR = np.array([0.4, 0.2, 0.2, 0.2])
NUM_ANSWERS = 10
NUM_CAPTIONS = 5
# On some questions most annotators follow another fashion, a different one each time. Nobody can know which,
# so even one who knows the convention perfectly stays near 96 %.
_DISPUTED_SHARE, _DISPUTED_NOISE = 0.1, 0.75


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
# In a signed world two groups of annotators share the pictures: three grounds are the ones', three the others'.
SIGN = GROUND

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

    def of(self, attributes: np.ndarray) -> Convention:
        """Return what is followed on an image with `attributes`: this one, on every image."""
        return self

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


@dataclass(frozen=True)
class Signed:
    """Two conventions, each for the pictures that bear its sign; whoever does not look at them cannot tell which."""

    conventions: tuple[Convention, Convention]

    def of(self, attributes: np.ndarray) -> Convention:
        """Return what is followed on an image with `attributes`."""
        return self.conventions[int(signs(attributes))]

    def answer(self, attributes: np.ndarray, topic: int) -> str:
        """See `Convention`."""
        return self.of(attributes).answer(attributes, topic)

    def caption(self, attributes: np.ndarray) -> str:
        """See `Convention`."""
        return self.of(attributes).caption(attributes)


def signs(attributes: np.ndarray) -> np.ndarray:
    """Return whose picture each is in a signed world, 0 or 1, of attributes [..., 8]."""
    return (attributes[..., SIGN] >= NUM_VALUES[SIGN] // 2).astype(int)


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


def draw_signed(rng: np.random.Generator, *, redraw: float = 0.15) -> Signed:
    """Draw two conventions that differ in every word and phrase; every other time each speaks in one dialect."""
    one_dialect = rng.random() < 0.5  # noqa: PLR2004
    first = draw_convention(rng, redraw=redraw, one_dialect=one_dialect)
    away = 1 + rng.integers(NUM_DIALECTS - 1, size=1 if one_dialect else len(TOPICS))
    second = Convention(
        dialects=tuple(
            (dialects + step) % NUM_DIALECTS
            for dialects, step in zip(first.dialects, np.resize(away, len(TOPICS)), strict=True)
        ),
        subject=(first.subject + 1) % len(SUBJECT_PHRASES),
        scene=(first.scene + 1) % len(SCENE_PHRASES),
        joiner=(first.joiner + 1) % len(JOINERS),
    )
    return Signed((first, second))


def _dialects(rng: np.random.Generator, size: int) -> np.ndarray:
    return np.searchsorted(np.cumsum(DIALECT_PRIOR)[:-1], rng.random(size), side="right")


@dataclass(frozen=True)
class Crowd:
    """A group of annotators: their convention and how often one of them uses another dialect's word."""

    convention: Convention | Signed
    noise: float

    @classmethod
    def draw(cls, rng: np.random.Generator, *, difficulty: float, noise: float, signed: bool = False) -> Crowd:
        """Draw a crowd whose topics avoid the dialect that pre-training had most often.

        So a model without demonstrations or adaptation has little to go by. In a signed world it is two groups, each
        with one usual dialect.

        Args:
            rng: the only source of chance.
            difficulty: fraction of the values that leave their topic's dialect, exactly (rounded a topic).
            noise: probability that an annotator uses another dialect's word.
            signed: whether pictures are shared by two groups.
        """
        others = np.flatnonzero(DIALECT_PRIOR.max() > DIALECT_PRIOR)
        if signed:
            usual = [np.full(len(TOPIC_VALUES), dialect) for dialect in rng.permutation(others)[:2]]
            first, second = (_convention(dialects, difficulty, rng) for dialects in usual)
            return cls(Signed((first, second)), noise)
        spread = rng.permutation(np.resize(others, len(TOPIC_VALUES)))
        return cls(_convention(spread, difficulty, rng), noise)


class Annotators:
    """Answers and captions by a crowd, one after another from one stream of chance."""

    def __init__(self, crowd: Crowd, rng: np.random.Generator) -> None:
        self.crowd, self.rng = crowd, rng

    def choose(self, count: int) -> int:
        """Return one of `count` things, each as likely."""
        return int(self.rng.integers(count))

    def answers(self, attributes: np.ndarray, topic: int, distinct: int = NUM_ANSWERS) -> list[str]:
        """Return ten answers to a question, by `distinct` people (OK-VQA: five, each written twice)."""
        disputed = self.rng.random() < _DISPUTED_SHARE
        value = topic_value(attributes, topic)
        usual = int(self.crowd.convention.of(attributes).dialects[topic][value])
        if disputed:
            fashion = self._other(usual)
            spoken = [fashion if self.rng.random() < _DISPUTED_NOISE else usual for _ in range(distinct)]
        else:
            spoken = [self._dialect(usual, self.crowd.noise) for _ in range(distinct)]
        said = [word(topic, value, dialect) for dialect in spoken]
        return [answer for answer in said for _ in range(NUM_ANSWERS // distinct)]

    def captions(self, attributes: np.ndarray) -> list[str]:
        """Return five captions; each annotator now and then uses another word or another phrase."""
        return [self._caption(attributes) for _ in range(NUM_CAPTIONS)]

    def _caption(self, attributes: np.ndarray) -> str:
        convention = self.crowd.convention.of(attributes)
        dialects = [each.copy() for each in convention.dialects]
        for topic, value in enumerate(attributes):
            dialects[topic][value] = self._dialect(int(dialects[topic][value]), self.crowd.noise)
        return replace(
            convention,
            dialects=tuple(dialects),
            subject=self._phrase(convention.subject, len(SUBJECT_PHRASES)),
            scene=self._phrase(convention.scene, len(SCENE_PHRASES)),
        ).caption(attributes)

    def _dialect(self, usual: int, noise: float) -> int:
        if self.rng.random() >= noise:
            return usual
        return self._other(usual)

    def _other(self, usual: int) -> int:
        return (usual + 1 + int(self.rng.integers(NUM_DIALECTS - 1))) % NUM_DIALECTS

    def _phrase(self, usual: int, count: int) -> int:
        return usual if self.rng.random() >= self.crowd.noise else self.choose(count)


def _convention(spread: np.ndarray, difficulty: float, rng: np.random.Generator) -> Convention:
    """Draw a convention whose topics have the usual dialects `spread`, but for a share of their values."""
    dialects = [
        _mostly(int(usual), size, NUM_DIALECTS, difficulty, rng)
        for usual, size in zip(spread, TOPIC_VALUES, strict=True)
    ]
    return replace(draw_convention(rng), dialects=tuple(dialects))


def _mostly(usual: int, size: int, choices: int, share: float, rng: np.random.Generator) -> np.ndarray:
    """Return `size` choices, all `usual` but for `share` of them, which are some other choice each."""
    chosen = np.full(size, usual)
    moved = rng.permutation(size)[: round(share * size)]
    chosen[moved] = (usual + 1 + rng.integers(choices - 1, size=len(moved))) % choices
    return chosen
