"""The examples of each step, and the parts that a step goes through the model in."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import numpy as np
from torch import Tensor

T = TypeVar("T")


def draws(count: int, size: int, seed: int) -> Iterator[list[int]]:
    """Yields the examples of each step; all are drawn before any is drawn again.

    Args:
        count: Number of examples.
        size: Examples in a step; all of them where there are fewer.
        seed: Of the order.
    """
    source = np.random.default_rng(seed)
    left: list[int] = []
    while True:
        while len(left) < min(size, count):
            left += source.permutation(count).tolist()
        taken, left = left[:size], left[size:]
        yield taken


def parts(rows: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """Yields rows in parts of a size, the last one smaller."""
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def total(values: Callable[[Sequence[T]], Tensor], rows: Sequence[T], size: int) -> float:
    """Returns the sum of what ``values`` gives for rows, asked in parts of a size."""
    return sum(float(values(part).sum()) for part in parts(rows, size))
