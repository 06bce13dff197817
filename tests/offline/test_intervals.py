"""Intervals cover what they say they cover, however few the values."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import bootstrap, ttest_1samp

from vllm_steer.offline.measures.intervals import SHARE, mean_interval, ratio_interval


@pytest.mark.parametrize("count", [2, 3, 5, 10])
def test_the_interval_of_a_mean_holds_over_few_values(count) -> None:
    rng = np.random.default_rng(0)
    ends = [mean_interval(values) for values in rng.normal(3.0, 2.0, (1500, count))]
    covered = np.mean([low <= 3.0 <= high for low, high in ends])
    # Three standard errors; the percentile bootstrap covers 0.5 over two, 0.75 over three.
    assert covered == pytest.approx(0.95, abs=0.017)


def test_the_interval_of_a_mean_is_scipys() -> None:
    values = np.random.default_rng(0).normal(size=7)
    assert mean_interval(values) == pytest.approx(
        tuple(ttest_1samp(values, 0).confidence_interval())
    )
    low, high = mean_interval(np.array([0.2, 0.9]), SHARE)
    assert (low, high) == (0.0, 1.0)


def test_there_is_none_where_nothing_tells_how_far_the_mean_is_off() -> None:
    for values in ([0.5], [1.0, 1.0, 1.0], [0.1 + 0.2, 0.3], [0.0, 0.0]):
        assert mean_interval(np.array(values)) == (None, None)
    assert ratio_interval(np.array([1.0, 2.0]), np.array([2.0, 3.0])) is None
    assert ratio_interval(np.array([0.3, 0.6, 0.9]), np.array([1.0, 2.0, 3.0])) is None


def test_the_interval_of_a_ratio_holds_over_few_pairs_and_is_the_bootstraps_over_many() -> None:
    rng = np.random.default_rng(0)

    def pairs(count: int) -> tuple[np.ndarray, np.ndarray]:
        wholes = rng.uniform(5, 15, count)
        return 0.4 * wholes + rng.normal(0, 2, count), wholes

    ends = [ratio_interval(*pairs(4)) for _ in range(1500)]
    assert np.mean([low <= 0.4 <= high for low, high in ends]) == pytest.approx(0.95, abs=0.02)
    parts, wholes = pairs(200)
    theirs = bootstrap(
        (parts, wholes),
        lambda up, total, axis: up.sum(axis=axis) / total.sum(axis=axis),
        paired=True,
        method="percentile",
        rng=rng,
    ).confidence_interval
    assert ratio_interval(parts, wholes) == pytest.approx((theirs.low, theirs.high), abs=0.003)
    same = ratio_interval(parts, np.ones(200))
    assert same == pytest.approx(mean_interval(parts))
