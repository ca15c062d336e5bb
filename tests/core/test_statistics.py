from __future__ import annotations

import math
import time

import numpy as np
import pytest

from pipeline.core.statistics import Effect, counted, effect, holm, interval, mean_std


def test_mean_and_sample_deviation() -> None:
    assert mean_std([1.0, 2.0, 4.0]) == (pytest.approx(7 / 3), pytest.approx(math.sqrt(7 / 3)))
    assert mean_std([5.0]) == (5.0, None)


def draws(
    draw: np.random.Generator, seeds: int, images: int, each: int, of_seed: float, of_image: float, rest: float
) -> np.ndarray:
    """Return differences whose true mean is 0, [seeds, images x each], with deviations of these sizes."""
    by_image = np.repeat(draw.normal(0, of_image, images), each)
    return draw.normal(0, of_seed, (seeds, 1)) + by_image + draw.normal(0, rest, (seeds, images * each))


@pytest.mark.parametrize("seeds", [3, 5])
@pytest.mark.parametrize(
    ("of_seed", "of_image", "rest"),
    [(1.0, 0.0, 0.1), (0.0, 1.0, 1.0), (0.1, 1.0, 1.0), (0.1, 0.2, 1.0), (0.0, 0.0, 1.0)],
)
def test_the_interval_over_seeds_and_images_holds_the_truth_as_often_as_it_says(
    seeds: int, of_seed: float, of_image: float, rest: float
) -> None:
    draw, images, repetitions = np.random.default_rng(seeds), np.repeat(np.arange(60), 2), 1000
    hits = 0
    for _ in range(repetitions):
        known = effect(draws(draw, seeds, 60, 2, of_seed, of_image, rest), images)
        assert known is not None
        low, high = known.interval()
        hits += low <= 0 <= high
        assert known.freedom >= seeds - 1  # below that an interval of tenths of a point becomes one of dozens
    assert hits / repetitions >= 0.95 - 3 * math.sqrt(0.95 * 0.05 / repetitions)
    if of_seed > rest or of_image == rest:  # one of them decides: no wider than it has to be
        assert hits / repetitions <= 0.95 + 3 * math.sqrt(0.95 * 0.05 / repetitions)


def test_the_error_is_that_of_a_bootstrap_over_seeds_and_images_and_not_its_percentiles() -> None:
    draw, seeds, count = np.random.default_rng(0), 5, 200
    images = np.repeat(np.arange(count), 2)
    scores = draws(draw, seeds, count, 2, 1.0, 4.0, 0.5)
    known = effect(scores, images)
    assert known is not None and (known.seeds, known.samples, known.images) == (5, 400, 200)
    of_images = np.stack([np.bincount(images, row, count) for row in scores]) / 2
    of_seeds = draw.multinomial(seeds, np.full(seeds, 1 / seeds), size=4000) / seeds
    chosen = draw.multinomial(count, np.full(count, 1 / count), size=4000) / count
    again = np.einsum("bs,sc,bc->b", of_seeds, of_images, chosen)
    # a resampled variance of n values is (n - 1)/n of the unbiased one
    seed_part = np.var(of_seeds @ of_images.mean(axis=1))
    unbiased = math.sqrt(again.var() + seed_part / (seeds - 1))
    assert known.error == pytest.approx(unbiased, rel=0.05)
    narrow = 0
    for _ in range(200):
        means = draw.normal(size=3)  # three seeds, and nothing else differs
        low, high = np.quantile(means[draw.integers(0, 3, (500, 3))].mean(axis=1), (0.025, 0.975))
        narrow += low <= 0 <= high
    assert narrow / 200 < 0.88


def test_samples_of_one_image_count_as_what_they_are() -> None:
    draw = np.random.default_rng(1)
    once = draw.normal(size=(1, 50))
    alone, thrice = effect(once, np.arange(50)), effect(np.repeat(once, 3, axis=1), np.repeat(np.arange(50), 3))
    assert alone is not None and thrice is not None
    assert thrice.error == pytest.approx(alone.error) and thrice.freedom == 49
    assert alone.error == pytest.approx(once.std(ddof=1) / math.sqrt(50))


def test_seeds_alone_are_students() -> None:
    known = effect(np.array([[1.0], [2.0], [4.0], [7.0]]), (0,))
    assert known is not None and known.freedom == 3
    half = 3.182446 * math.sqrt(7) / 2
    assert known.interval() == pytest.approx((3.5 - half, 3.5 + half))
    assert effect(np.array([[1.0]]), (0,)) is None and effect(np.array([[1.0, 2.0]]), (0, 0)) is None


def test_what_is_hard_for_all_seeds_and_both_methods_falls_out() -> None:
    hard = np.random.default_rng(0).normal(size=(3, 500))
    known = effect((hard + 0.01) - hard, np.arange(500))
    assert known is not None and known.clear and known.interval() == (pytest.approx(0.01), pytest.approx(0.01))


def test_odds_on_either_side_of_a_bound() -> None:
    known = Effect(1.0, 0.5, 4, 5, 100, 100)
    # Student's t with 4 degrees of freedom: its distribution in closed form
    t = (1.0 - 0.5) / 0.5
    upper = 0.5 - 0.5 * (t / math.sqrt(t**2 + 4)) * (1 + 2 / (t**2 + 4))
    assert known.odds_above(0.5) == pytest.approx(upper) and known.odds_below(0.5) == pytest.approx(1 - upper)
    low, high = known.interval()
    assert known.odds_above(low) == pytest.approx(0.025) and known.odds_below(high) == pytest.approx(0.025)
    assert known.seen() == pytest.approx((2.776445 + 0.940965) * 0.5, rel=1e-5)
    exact = counted(2.0)
    assert (exact.odds_above(1.9), exact.odds_above(2.0), exact.odds_below(2.0), exact.odds_below(2.1)) == (0, 1, 1, 0)


def test_what_would_be_seen_is_seen_in_four_of_five() -> None:
    draw, found = np.random.default_rng(2), 0
    reach = Effect(0.0, math.sqrt(1 / 200), 199, 1, 200, 200).seen()
    for _ in range(1000):
        known = effect(draw.normal(reach, 1, (1, 200)), np.arange(200))
        found += known is not None and known.interval()[0] > 0
    assert 0.76 < found / 1000 < 0.84


def test_holm_by_hand() -> None:
    # sorted 0.005, 0.01, 0.03, 0.04: times 4, 3, 2, 1, none below the one before
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1.0, 1.0] and holm([]) == [] and holm([0.02]) == [0.02]


def test_thousands_of_samples_take_no_time() -> None:
    scores, images = np.random.default_rng(0).normal(size=(5, 10_000)), np.arange(10_000)
    started = time.process_time()
    for _ in range(100):
        effect(scores, images)
    assert time.process_time() - started < 2


def test_the_interval_of_a_share_is_wilsons_and_of_a_mean_students() -> None:
    assert interval([100.0] * 6, top=100.0) == pytest.approx((60.96657, 100.0))
    assert interval([0.0] * 20, top=100.0) == (0.0, pytest.approx(16.11252))  # and not rounded to less
    assert interval([1.0] * 30 + [0.0] * 70, top=1.0) == pytest.approx((0.218949, 0.395849), rel=1e-5)
    half = 3.182446 * math.sqrt(7) / 2  # three degrees of freedom
    assert interval([1.0, 2.0, 4.0, 7.0]) == pytest.approx((3.5 - half, 3.5 + half))
    assert interval([3.0]) is None and interval([]) is None and interval([], top=1.0) is None
    assert interval([100.0] * 12, 100.0, np.repeat(np.arange(6), 2)) == pytest.approx((60.96657, 100.0))
    twice = interval([1.0] * 60 + [0.0] * 140, 1.0, np.repeat(np.arange(100), 2))
    assert twice == pytest.approx((0.218949, 0.395849), abs=2e-3)


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    draw = np.random.default_rng(3)
    hits = {"share": 0, "mean": 0}
    for _ in range(2000):
        share = interval(list((draw.random(40) < 0.8).astype(float)), top=1.0)
        mean = interval(list(draw.normal(5, 2, 40)))
        assert share is not None and mean is not None
        hits["share"] += share[0] <= 0.8 <= share[1]
        hits["mean"] += mean[0] <= 5 <= mean[1]
    assert all(0.93 < count / 2000 < 0.97 for count in hits.values()), hits


def test_scores_without_a_spread_have_an_interval_and_are_no_exact_count() -> None:
    for scores in (np.zeros((3, 8)), np.array([[100.0, 0.0], [0.0, 100.0]])):
        known = effect(scores, np.arange(scores.shape[1]))
        assert known is not None and known.error == 0 and not known.exact
        assert known.interval() == (known.mean, known.mean)
    assert counted(3.0).exact
