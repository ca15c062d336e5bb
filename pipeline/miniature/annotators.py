"""The annotators of the down-stream data sets: a fixed convention, and people who do not always follow it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from pipeline.miniature.lexicon import (
    DIALECT_PRIOR,
    NUM_DIALECTS,
    SCENE_PHRASES,
    SUBJECT_PHRASES,
    TOPIC_VALUES,
    Convention,
    draw_convention,
    topic_value,
    word,
)

NUM_ANSWERS = 10
NUM_CAPTIONS = 5
# On some questions most annotators follow another fashion, a different one each time. Nobody can know which,
# so even one who knows the convention perfectly stays near 96 %.
_DISPUTED_SHARE, _DISPUTED_NOISE = 0.1, 0.75


@dataclass(frozen=True)
class Crowd:
    """A group of annotators: their convention and how often one of them uses another dialect's word."""

    convention: Convention
    noise: float

    @classmethod
    def draw(cls, rng: np.random.Generator, *, difficulty: float, noise: float) -> Crowd:
        """Draw a crowd whose topics avoid the dialect that pre-training had most often.

        So a model without demonstrations or adaptation has little to go by.

        Args:
            rng: the only source of chance.
            difficulty: fraction of the values that leave their topic's dialect, exactly (rounded a topic).
            noise: probability that an annotator uses another dialect's word.
        """
        others = np.flatnonzero(DIALECT_PRIOR.max() > DIALECT_PRIOR)
        spread = rng.permutation(np.resize(others, len(TOPIC_VALUES)))
        dialects = [
            _mostly(int(usual), size, NUM_DIALECTS, difficulty, rng)
            for usual, size in zip(spread, TOPIC_VALUES, strict=True)
        ]
        convention = replace(draw_convention(rng), dialects=tuple(dialects))
        return cls(convention, noise)


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
        usual = int(self.crowd.convention.dialects[topic][value])
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
        convention = self.crowd.convention
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


def _mostly(usual: int, size: int, choices: int, share: float, rng: np.random.Generator) -> np.ndarray:
    """Return `size` choices, all `usual` but for `share` of them, which are some other choice each."""
    chosen = np.full(size, usual)
    moved = rng.permutation(size)[: round(share * size)]
    chosen[moved] = (usual + 1 + rng.integers(choices - 1, size=len(moved))) % choices
    return chosen
