"""95 % intervals of means and of shares, by Student's t: over few concepts the bootstrap's are too narrow.

The percentile bootstrap covers a normal mean in 0.5 of cases for 2 values and in 0.75 for 3, and no
resampling method knows more than its values. t covers 0.95 of normal means for any number. ``python -m
benchmarks.statistics`` has its coverage for other populations, and where it fails.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t

Doubles = NDArray[np.float64]

CONFIDENCE = 0.95
SHARE = (0.0, 1.0)
"""Ends of the range of what is a share."""
CAVEAT = (
    "95 % intervals are Student's t, which holds for values that lie like a bell; over few that do not, such as "
    "grades near 0 or 1, it covers less, down to 0.91. Values that are all equal have none"
)
"""Explanation shown with intervals."""
# Number of values below which the ratio's linear form is unreliable.
_FEWEST = 3
_TINY = 1e-9


def mean_interval(
    values: Doubles, within: tuple[float, float] = (-np.inf, np.inf)
) -> tuple[float | None, float | None]:
    """Returns the interval of a mean, such as one over concepts.

    Args:
        values: ``[values]``, float64, finite.
        within: Ends of the range that values can have; the interval does not leave it.

    Returns:
        Its ends; None for both with fewer than two values, and where all are equal: their spread says nothing
        about the error of the mean.
    """
    if len(values) < 2:
        return None, None
    ends = _around(float(values.mean()), values - values.mean())
    return (max(ends[0], within[0]), min(ends[1], within[1])) if ends else (None, None)


def ratio_interval(parts: Doubles, wholes: Doubles) -> tuple[float, float] | None:
    """Returns the interval of ``parts.sum() / wholes.sum()`` over pairs, in the ratio's linear form.

    Args:
        parts: ``[pairs]``, float64.
        wholes: ``[pairs]``, float64.

    Returns:
        Its ends; None with fewer than three pairs, where all have the same ratio, or where the wholes do
        not sum to more than 0, so that there is no ratio.
    """
    whole = float(wholes.sum())
    if len(parts) < _FEWEST or whole <= _TINY:
        return None
    ratio = float(parts.sum()) / whole
    return _around(ratio, (parts - ratio * wholes) * len(wholes) / whole)


def _around(centre: float, deviations: Doubles) -> tuple[float, float] | None:
    count = len(deviations)
    error = float(np.sqrt(np.square(deviations).sum() / (count * (count - 1))))
    # Equal values differ by rounding.
    if error <= _TINY * max(abs(centre), _TINY):
        return None
    half = float(t.ppf((1 + CONFIDENCE) / 2, count - 1)) * error
    return centre - half, centre + half
