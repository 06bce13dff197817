"""How well scores tell texts apart, against other implementations and by simulation."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from vllm_steer.offline.measures.detection import (
    auroc,
    auroc_intervals,
    least_negatives,
    rate_above,
    separation,
    threshold,
)


def test_auroc_is_that_of_scikit_learn_with_ties() -> None:
    rng = np.random.default_rng(0)
    positive, negative = rng.integers(1, 9, (3, 20)) * 1.0, rng.integers(0, 7, (3, 31)) * 1.0
    labels = [1] * 20 + [0] * 31
    expected = [roc_auc_score(labels, [*p, *n]) for p, n in zip(positive, negative, strict=True)]
    assert np.allclose(auroc(positive, negative), expected)
    assert np.allclose(auroc(positive.T, negative.T, axis=0), expected)


def test_intervals_of_the_auroc_cover_it() -> None:
    rng = np.random.default_rng(1)
    # Scores of unit variance whose means lie 1 apart: Φ(1/√2).
    true, count = 0.7602, 80
    positive, negative = rng.normal(1.0, 1.0, (count, 40)), rng.normal(0.0, 1.0, (count, 60))
    low, high = auroc_intervals(positive, negative, 0)
    assert 0.90 < np.mean((low <= true) & (true <= high)) < 0.99
    apart = auroc_intervals(positive[:1] + 100, negative[:1], 0)
    assert apart[0] == apart[1] == 1.0


def test_a_threshold_is_exceeded_as_rarely_as_it_says_whatever_the_distribution() -> None:
    rng = np.random.default_rng(2)
    for draw in (rng.standard_normal, rng.standard_cauchy):
        above = [threshold(draw(120), 0.05).above for _ in range(500)]
        exceeded = np.mean([draw(50) > each for each in above])
        # ⌈121 · 0.95⌉ = 115 of 120: 6 in 121 at most.
        assert abs(exceeded - 6 / 121) < 0.005
    with pytest.raises(IndexError):
        threshold(rng.standard_normal(least_negatives(0.01) - 1), 0.01)
    assert threshold(np.arange(99.0), 0.01).above == 98.0


def test_intervals_of_a_threshold_cover_the_quantile() -> None:
    rng = np.random.default_rng(3)
    found = [threshold(rng.random(400), 0.05) for _ in range(500)]
    covered = [f.low <= 0.95 <= f.high for f in found if f.low is not None and f.high is not None]
    assert len(covered) == 500
    assert 0.94 < np.mean(covered) < 0.99
    assert all(f.low <= f.above for f in found if f.low is not None)
    # Of 99 texts the most extreme are too few for an upper end.
    assert threshold(rng.random(99), 0.01).high is None


def test_rates_are_of_what_is_greater() -> None:
    found = rate_above(np.array([0.0, 1.0, 1.0, 2.0]), 1.0)
    assert found.share == 0.25
    # Clopper and Pearson's, from their table.
    assert (round(found.low, 4), round(found.high, 4)) == (0.0063, 0.8059)
    assert rate_above(np.zeros(100), 1.0).low == 0.0


def test_separation_is_in_standard_deviations() -> None:
    rng = np.random.default_rng(4)
    found = separation(rng.normal(6.0, 2.0, (1, 50_000)), rng.normal(0.0, 2.0, (1, 50_000)))
    assert abs(found[0] - 3.0) < 0.05
