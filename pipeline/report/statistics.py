"""Mean and spread over seeds, the error of a mean over samples, and the paired bootstrap over samples."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 10_000
_TAILS = ((1 - 0.95) / 2, 1 - (1 - 0.95) / 2)  # to the bit as they were computed for every number that is printed
_Z = 1.959964  # the normal's 97.5 % point
_BLOCK = 4_000_000  # resampled counts held at once: 32 MB


@dataclass(frozen=True)
class Difference:
    """A difference of two methods on the same samples, a - b, with the ends of its confidence interval."""

    mean: float
    low: float
    high: float
    num_samples: int

    @property
    def clear(self) -> bool:
        """Whether the interval leaves zero out."""
        return self.low > 0 or self.high < 0


def mean_std(values: Sequence[float]) -> tuple[float, float | None]:
    """Return the mean and the sample standard deviation (n - 1); no deviation for a single value."""
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return mean, None
    return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))


def interval(scores: Sequence[float], top: float | None = None) -> tuple[float, float] | None:
    """Return the 95 % interval of a mean over samples.

    Args:
        scores: one a sample.
        top: the best that a sample can get where 0 is the worst: the mean is then a share, and the interval Wilson's,
            which is right for six samples that are all right too. None: no bound; Student's interval.

    Returns:
        Its ends, in the scores' unit; None where nothing can be said: for a single sample without a bound.
    """
    size = len(scores)
    if top is not None and size:
        share = math.fsum(scores) / (size * top)
        middle = share + _Z**2 / (2 * size)
        half = _Z * math.sqrt(max(0.0, share * (1 - share)) / size + (_Z / (2 * size)) ** 2)
        return top * (middle - half) / (1 + _Z**2 / size), top * (middle + half) / (1 + _Z**2 / size)
    mean, std = mean_std(scores) if scores else (0.0, None)
    if std is None:
        return None
    half = _student(size - 1) * std / math.sqrt(size)
    return mean - half, mean + half


def _student(freedom: int) -> float:
    """Return the 97.5 % point of Student's t (Abramowitz and Stegun 26.7.5; within 1 % from 3 degrees on)."""
    return (
        _Z
        + (_Z**3 + _Z) / (4 * freedom)
        + (5 * _Z**5 + 16 * _Z**3 + 3 * _Z) / (96 * freedom**2)
        + (3 * _Z**7 + 19 * _Z**5 + 17 * _Z**3 - 15 * _Z) / (384 * freedom**3)
    )


def paired_bootstrap(a: Mapping[str, float], b: Mapping[str, float]) -> Difference | None:
    """Return mean(a - b) over the samples that both have, with its percentile bootstrap interval of 95 %.

    The samples are drawn again with replacement, both methods' scores of a sample together, so that what makes
    a sample hard for both falls out (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, ch. 13).

    Returns:
        The difference in the scores' unit; None where fewer than two samples are shared.
    """
    shared = sorted(a.keys() & b.keys())
    if len(shared) < 2:
        return None
    gaps = np.array([a[key] - b[key] for key in shared], dtype=np.float64)
    low, high = np.quantile(_resampled_means(gaps, RESAMPLES, np.random.default_rng(0)), _TAILS)
    return Difference(float(gaps.mean()), float(low), float(high), len(shared))


def _resampled_means(gaps: np.ndarray, resamples: int, draw: np.random.Generator) -> np.ndarray:
    """Return the mean of each of `resamples` draws with replacement from `gaps`, [resamples]."""
    distinct, counts = np.unique(gaps, return_counts=True)
    size, few = len(gaps), len(distinct) * 8 < len(gaps)
    means = np.empty(resamples)
    block = max(1, _BLOCK // (len(distinct) if few else size))
    for start in range(0, resamples, block):
        count = min(block, resamples - start)
        if few:  # how often each distinct gap is drawn is multinomial: the same law at a fraction of the draws
            means[start : start + count] = draw.multinomial(size, counts / size, size=count) @ distinct / size
        else:
            means[start : start + count] = gaps[draw.integers(0, size, (count, size), dtype=np.int32)].mean(axis=1)
    return means
