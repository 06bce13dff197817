"""The share of a gap that is closed: the gap that a prefix makes in how likely its model's answers are."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.stats import bootstrap

Doubles = NDArray[np.float64]

CONFIDENCE = 0.95
_RESAMPLES = 2000
# Questions below which an interval over them says nothing.
_FEWEST = 3
_TINY = 1e-9


def closed(raised: Doubles, gap: Doubles) -> float:
    """Returns the share of a gap that is closed, in summed log-likelihood: 0 is no effect, 1 the prefix's.

    Args:
        raised: ``[questions]``; by how much steering raises the log-likelihood of the prefixed model's
            answer after the plain prompt.
        gap: ``[questions]``; by how much the prefix does.
    """
    return float(raised.sum() / max(gap.sum(), _TINY))


def closed_interval(raised: Doubles, gap: Doubles, seed: int) -> tuple[float, float] | None:
    """Returns the 95 % bootstrap interval of :func:`closed` over questions; None with fewer than three."""
    if len(raised) < _FEWEST:
        return None
    found = bootstrap(
        (raised, gap),
        lambda up, total, axis: up.sum(axis=axis) / np.maximum(total.sum(axis=axis), _TINY),
        paired=True,
        n_resamples=_RESAMPLES,
        confidence_level=CONFIDENCE,
        method="percentile",
        random_state=np.random.default_rng(seed),
    ).confidence_interval
    return float(found.low), float(found.high)
