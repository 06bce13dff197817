"""How well scores tell two kinds of texts apart, and thresholds that few texts of the one kind exceed.

The AUROC is that of Mann and Whitney, ties counted by half; its interval is the percentile bootstrap's over texts.
A threshold is an order statistic of the negative texts, as in split conformal prediction: of n texts the k-th smallest
score, k = ⌈(n + 1)(1 − fpr)⌉, is exceeded by a new one with a probability of fpr at most, whatever the distribution.
Its interval is that of the quantile, likewise from order statistics; that of a share is Clopper and Pearson's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest, bootstrap, quantile_test, rankdata

from vllm_steer.offline.measures.intervals import CONFIDENCE

Doubles = NDArray[np.float64]

_RESAMPLES = 2000
# Resamples that are ranked at once, of all layers.
_BATCH = 250
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Threshold:
    """A threshold, with the interval of the quantile that it estimates; None for an end that texts are too few for."""

    above: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Rate:
    """A share of texts, with its interval."""

    share: float
    low: float
    high: float


def auroc(positive: Doubles, negative: Doubles, axis: int = -1) -> Doubles:
    """Returns how often a positive text scores higher than a negative one, ties counted by half.

    Args:
        positive: Scores, ``[..., positives]`` where the axis is the last.
        negative: ``[..., negatives]``.
        axis: The axis of texts.
    """
    positive, negative = np.moveaxis(positive, axis, -1), np.moveaxis(negative, axis, -1)
    count, others = positive.shape[-1], negative.shape[-1]
    ranks = rankdata(np.concatenate([positive, negative], axis=-1), axis=-1)
    wins: Doubles = ranks[..., :count].sum(-1) - count * (count + 1) / 2
    return wins / (count * others)


def auroc_intervals(positive: Doubles, negative: Doubles, seed: int) -> tuple[Doubles, Doubles]:
    """Returns the ends of the 95 % intervals of AUROCs; equal ends where no resample has another value.

    Args:
        positive: ``[layers, positives]``.
        negative: ``[layers, negatives]``.
        seed: Seed of the resamples.

    Returns:
        Both ``[layers]``.
    """
    found = bootstrap(
        (positive, negative),
        auroc,
        axis=-1,
        vectorized=True,
        confidence_level=CONFIDENCE,
        n_resamples=_RESAMPLES,
        batch=_BATCH,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return found.low, found.high


def separation(positive: Doubles, negative: Doubles) -> Doubles:
    """Returns d′, the distance of the means over the standard deviation of both kinds, along the last axis."""
    spread = np.sqrt((positive.var(-1) + negative.var(-1)) / 2)
    distance: Doubles = positive.mean(-1) - negative.mean(-1)
    return distance / np.maximum(spread, np.finfo(np.float64).tiny)


def least_negatives(fpr: float) -> int:
    """Returns how many negative texts a threshold for a false-positive rate needs at the least."""
    return math.ceil(1 / fpr - 1 - _ROUNDING)


def threshold(negative: Doubles, fpr: float) -> Threshold:
    """Returns the threshold for a false-positive rate.

    Args:
        negative: Scores of negative texts, ``[negatives]``, :func:`least_negatives` at the least.
        fpr: The rate, between 0 and 1.
    """
    count = len(negative)
    rank = math.ceil((count + 1) * (1 - fpr) - _ROUNDING)
    above = float(np.sort(negative)[rank - 1])
    ends = quantile_test(negative, q=above, p=1 - fpr).confidence_interval(CONFIDENCE)
    low, high = (float(end) if np.isfinite(end) else None for end in ends)
    return Threshold(above, low, high)


def rate_above(scores: Doubles, above: float) -> Rate:
    """Returns the share of texts that score higher than a threshold.

    Args:
        scores: ``[texts]``, one at the least.
        above: The threshold.
    """
    hits = int((scores > above).sum())
    ends = binomtest(hits, len(scores)).proportion_ci(CONFIDENCE, method="exact")
    return Rate(hits / len(scores), float(ends.low), float(ends.high))
