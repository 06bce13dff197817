"""Means of ratings, and how figures are written."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from pydantic import BaseModel, ConfigDict

from vllm_steer.offline.measures.intervals import mean_interval


class Mean(BaseModel):
    """A mean, with its 95 % interval by Student's t.

    Attributes:
        value: The mean.
        low: Lower end; None where the values have none.
        high: Upper end.
    """

    model_config = ConfigDict(frozen=True)

    value: float
    low: float | None = None
    high: float | None = None

    @classmethod
    def of(cls, values: Sequence[float], within: tuple[float, float]) -> Mean:
        """Returns the mean of values, at least one."""
        array = np.array(values, dtype=np.float64)
        low, high = mean_interval(array, within)
        return cls(value=float(array.mean()), low=low, high=high)

    def __str__(self) -> str:
        return f"{self.value:.3f}" + (
            "" if self.low is None else f" [{self.low:.2f}, {self.high:.2f}]"
        )


def harmonic(values: Sequence[float]) -> float:
    """Returns the harmonic mean of values, none of them negative; 0 where one of them is 0."""
    return 0.0 if min(values) <= 0 else len(values) / sum(1 / value for value in values)


def shown(value: float | None, digits: int = 3) -> str:
    """Returns a figure for a table; a dash for none."""
    return "–" if value is None else f"{value:.{digits}f}"
