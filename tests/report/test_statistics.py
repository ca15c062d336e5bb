from __future__ import annotations

import math

import numpy as np
import pytest

from pipeline.report.statistics import interval, mean_std, paired_bootstrap


def test_mean_and_sample_deviation() -> None:
    assert mean_std([1.0, 2.0, 4.0]) == (pytest.approx(7 / 3), pytest.approx(math.sqrt(7 / 3)))
    assert mean_std([5.0]) == (5.0, None)


@pytest.mark.parametrize("kind", ["many distinct gaps", "zeros and ones"])
def test_the_interval_is_the_normal_one_where_the_normal_one_is_right(kind: str) -> None:
    draw = np.random.default_rng(1)
    gaps = draw.normal(0.1, 1, 2000) if kind == "many distinct gaps" else (draw.random(2000) < 0.3).astype(float)
    found = paired_bootstrap({str(i): gap for i, gap in enumerate(gaps)}, {str(i): 0.0 for i in range(2000)})
    error = gaps.std() / math.sqrt(2000)
    assert found is not None
    assert found.mean == pytest.approx(gaps.mean())
    assert found.low == pytest.approx(gaps.mean() - 1.96 * error, abs=0.1 * error)
    assert found.high == pytest.approx(gaps.mean() + 1.96 * error, abs=0.1 * error)


def test_what_is_hard_for_both_falls_out() -> None:
    draw = np.random.default_rng(0)
    hard = {str(i): float(x) for i, x in enumerate(draw.normal(size=500))}
    found = paired_bootstrap({key: value + 0.01 for key, value in hard.items()}, hard)
    assert found is not None
    assert found.clear
    assert (found.low, found.high) == (pytest.approx(0.01), pytest.approx(0.01))


def test_only_shared_samples_count_and_equal_seeds_give_equal_intervals() -> None:
    a, b = {"1": 1.0, "2": 0.0, "3": 1.0}, {"2": 1.0, "3": 0.0, "4": 9.0}
    found = paired_bootstrap(a, b)
    assert found is not None
    assert (found.mean, found.num_samples, found.clear) == (0.0, 2, False)
    assert found == paired_bootstrap(a, b)
    assert paired_bootstrap(a, {"1": 1.0}) is None


def test_the_interval_of_a_share_is_wilsons_and_of_a_mean_students() -> None:
    assert interval([100.0] * 6, top=100.0) == pytest.approx((60.96657, 100.0))
    assert interval([1.0] * 30 + [0.0] * 70, top=1.0) == pytest.approx((0.218949, 0.395849), rel=1e-5)
    half = 3.182446 * math.sqrt(7) / 2  # three degrees of freedom
    assert interval([1.0, 2.0, 4.0, 7.0]) == pytest.approx((3.5 - half, 3.5 + half), abs=0.01 * half)
    assert interval([3.0]) is None and interval([]) is None and interval([], top=1.0) is None


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
