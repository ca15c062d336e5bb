"""What numbers over seeds and evaluation samples allow to say: means, intervals, one-sided tests, Holm's correction."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import (
    stdtr,
    stdtrit,
)  # Student's distribution and its quantiles; scipy.stats takes a second to import

LEVEL = 0.95  # of every interval that is printed
POWER = 0.8  # of "would have been seen"
_Z = 1.959964  # the normal's 97.5 % point


@dataclass(frozen=True)
class Effect:
    """A mean over seeds and evaluation samples, of scores or of their differences, with its error.

    Attributes:
        mean: in the scores' unit.
        error: its standard error; 0 where it is counted and not estimated, and where no score differs from another.
        freedom: degrees of freedom of the error.
        seeds: how many seeds it is of; with one, the error leaves out what another seed would change.
        samples: evaluation samples of a seed.
        images: the groups that these are of.
    """

    mean: float
    error: float
    freedom: float
    seeds: int
    samples: int
    images: int

    def interval(self, level: float = LEVEL) -> tuple[float, float]:
        """Return the ends of Student's interval."""
        half = float(stdtrit(self.freedom, (1 + level) / 2)) * self.error
        return self.mean - half, self.mean + half

    @property
    def exact(self) -> bool:
        """Whether it is counted and not estimated."""
        return math.isinf(self.freedom)

    @property
    def clear(self) -> bool:
        """Whether the interval leaves zero out."""
        low, high = self.interval()
        return low > 0 or high < 0

    def odds_above(self, bound: float) -> float:
        """Return p of the test whose alternative is that the true mean is above `bound`."""
        return self._tail(bound - self.mean)

    def odds_below(self, bound: float) -> float:
        """Return p of the test whose alternative is that the true mean is below `bound`."""
        return self._tail(self.mean - bound)

    def _tail(self, short: float) -> float:
        if self.error == 0:
            return float(short >= 0)
        return float(stdtr(self.freedom, short / self.error))

    def seen(self, level: float = LEVEL) -> float:
        """Return how far off a bound the truth must be for the interval to leave it out in four repetitions of five.

        The sum of the two quantiles times the error: the usual approximation to the noncentral t.
        """
        return float(stdtrit(self.freedom, (1 + level) / 2) + stdtrit(self.freedom, POWER)) * self.error


def effect(scores: np.ndarray, images: Sequence[int | str] | np.ndarray) -> Effect | None:
    """Return the mean of scores over seeds and samples with its error, both drawn again, samples by whole images.

    Seeds (initialisation, order, demonstrations, and the draw of training samples where each has its own) and images
    are crossed: each seed is scored on all images. With s, i and r the mean squares of seeds, of images and of what is
    left, each over the number of scores behind the mean, the variance is s + max(i - r, 0), and Satterthwaite's degrees
    of freedom are its square over s^2 / (S - 1) + i^2 / (C - 1) + r^2 / ((S - 1)(C - 1)), and at least the S - 1 of s:
    the difference i - r of two like numbers would have next to none. That is the readers-by-cases design of Obuchowski
    and Rockette (1995) and Hillis (Statistics in Medicine 26, 2007). This variance is what a hierarchical
    bootstrap over seeds and images estimates (Owen, Annals of Applied Statistics 1, 2007); its percentiles are too
    narrow for few seeds: where seeds are what differs, they hold the truth 79 times in 100 with three seeds and 87
    times with five, and this interval 95 times (tests/core/test_statistics.py).

    Args:
        scores: [seeds, samples]; differences where two methods are compared.
        images: [samples], a number or name for the image of each.

    Returns:
        In the scores' unit; None where nothing can be said: for one seed with fewer than two images.
    """
    seeds, samples = scores.shape
    _, place = np.unique(images, return_inverse=True)
    sizes = np.bincount(place)
    count = len(sizes)
    mean = float(scores.mean())
    off_seed = scores.mean(axis=1) - mean
    sums = np.stack([np.bincount(place, row - mean, count) for row in scores]) / samples  # [seeds, images]
    off_image = sums.mean(axis=0)
    of_images = float((off_image**2).sum()) * count / (count - 1) if count > 1 else 0.0
    if seeds == 1:
        return Effect(mean, math.sqrt(of_images), count - 1, 1, samples, count) if count > 1 else None
    rest = sums - off_image - np.outer(off_seed, sizes / samples)
    of_rest = float((rest**2).sum()) * count / ((count - 1) * seeds * (seeds - 1)) if count > 1 else 0.0
    of_seeds = float((off_seed**2).sum()) / (seeds * (seeds - 1))
    variance = of_seeds + max(of_images - of_rest, 0.0)
    spread = of_seeds**2 / (seeds - 1)
    if count > 1:
        spread += of_images**2 / (count - 1) + of_rest**2 / ((seeds - 1) * (count - 1))
    freedom = max(variance**2 / spread, seeds - 1) if variance else seeds - 1
    return Effect(mean, math.sqrt(variance), freedom, seeds, samples, count)


def counted(value: float) -> Effect:
    """Return a number that is counted, as FLOPs are, and has no error."""
    return Effect(value, 0.0, math.inf, 1, 1, 1)


def holm(odds: Sequence[float]) -> list[float]:
    """Return p of several tests, adjusted so that all of them together err with the stated chance (Holm, 1979).

    The k-th smallest of m is multiplied by m - k + 1, and none is below one that was smaller.
    """
    adjusted, above = [0.0] * len(odds), 0.0
    for rank, place in enumerate(sorted(range(len(odds)), key=odds.__getitem__)):
        above = max(above, min(1.0, (len(odds) - rank) * odds[place]))
        adjusted[place] = above
    return adjusted


def ratio_interval(parts: Sequence[float], wholes: Sequence[float]) -> tuple[float, float] | None:
    """Return the 95 % interval of a ratio of sums over samples, by its linear part (the ratio estimator's usual error).

    Args:
        parts: one a sample, such as the invented objects of a caption.
        wholes: likewise, such as the objects that it names.
    """
    part, whole = np.asarray(parts, dtype=np.float64), np.asarray(wholes, dtype=np.float64)
    if not whole.sum():
        return None
    ratio = part.sum() / whole.sum()
    return interval((ratio + (part - ratio * whole) / whole.mean()).tolist())


def sum_interval(groups: Sequence[Sequence[float]]) -> tuple[float, float] | None:
    """Return the 95 % interval of the sum of several groups' means, each over samples of its own (Welch's)."""
    known = [effect(np.asarray([group]), np.arange(len(group))) for group in groups]
    parts = [part for part in known if part is not None]
    variance = sum(part.error**2 for part in parts)
    if not parts or len(parts) < len(known):
        return None
    freedom = variance**2 / sum(part.error**4 / part.freedom for part in parts) if variance else math.inf
    return Effect(sum(part.mean for part in parts), math.sqrt(variance), freedom, 1, 0, 0).interval()


def mean_std(values: Sequence[float]) -> tuple[float, float | None]:
    """Return the mean and the sample standard deviation (n - 1); no deviation for a single value."""
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return mean, None
    return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))


def interval(
    scores: Sequence[float], top: float | None = None, images: Sequence[int | str] | np.ndarray | None = None
) -> tuple[float, float] | None:
    """Return the 95 % interval of a mean over samples.

    Args:
        scores: one a sample.
        top: the best that a sample can get where 0 is the worst: the mean is then a share, and the interval Wilson's,
            which is right for six samples that are all right too. None: no bound; Student's interval.
        images: a number or name for the image of each, where several may be of one: the samples then count for as many
            as would give the same error one by one (Kish's design effect), which is never more than there are.

    Returns:
        Its ends, in the scores' unit; None where nothing can be said: for a single sample without a bound.
    """
    if not scores:
        return None
    values = np.asarray(scores, dtype=np.float64)
    known = effect(values[None], np.arange(len(values)) if images is None else images)
    if top is None:
        return known.interval() if known else None
    size: float = len(values)
    if known and known.error and images is not None:
        size = min(size, float(values.var(ddof=1)) / known.error**2)
    elif known and images is not None:
        size = known.images
    share = math.fsum(scores) / (len(values) * top)
    middle = share + _Z**2 / (2 * size)
    half = _Z * math.sqrt(max(0.0, share * (1 - share)) / size + (_Z / (2 * size)) ** 2)
    ends = (max(0.0, middle - half), middle + half)  # of no success at all rounding would make a number below 0
    return top * ends[0] / (1 + _Z**2 / size), top * ends[1] / (1 + _Z**2 / size)
