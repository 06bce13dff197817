"""The share of a gap that is closed: the gap that a prefix makes in how likely its model's answers are."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Doubles = NDArray[np.float64]

_TINY = 1e-9


def closed(raised: Doubles, gap: Doubles) -> float:
    """Returns the share of a gap that is closed, in summed log-likelihood: 0 is no effect, 1 the prefix's.

    Of a gap that is none, where the prefix makes its answers no likelier, nothing is closed: 0.

    Args:
        raised: ``[questions]``; by how much steering raises the log-likelihood of the prefixed model's
            answer after the plain prompt.
        gap: ``[questions]``; by how much the prefix does.
    """
    whole = float(gap.sum())
    return float(raised.sum()) / whole if whole > _TINY else 0.0
