"""Rounds of timed runs in random order, and the ratios between arms of one round.

The speed of a shared machine varies from minute to minute, so a ratio compares adjacent runs: each round runs
every arm once in random order, and divides by plain vLLM's speed in that round.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TypeVar

import numpy as np

T = TypeVar("T")
BOOTSTRAP = 2000
CONFIDENCE = 95.0


@dataclass(frozen=True)
class Ratio:
    """The ratios of the rounds.

    Attributes:
        median: Their median.
        low: Lower end of the median's 95 % confidence interval, by bootstrap over the rounds.
        high: Upper end.
    """

    median: float
    low: float
    high: float

    def as_dict(self) -> dict[str, float]:
        """Rounded, for JSON."""
        return {key: round(value, 5) for key, value in asdict(self).items()}


def rounds(
    names: Sequence[str],
    measure: Callable[[str, random.Random], T],
    count: int,
    seed: int,
    after_each: Callable[[], object],
) -> list[dict[str, T]]:
    """Measures every arm once in each round, in random order.

    Args:
        names: Names of the arms.
        measure: Runs an arm once, with its own source of randomness.
        count: Number of rounds.
        seed: Seed of the orders and of the arms' randomness.
        after_each: Called after each run, to show progress.
    """
    order_rng = random.Random(seed)
    results: list[dict[str, T]] = []
    for number in range(count):
        order = order_rng.sample(list(names), len(names))
        found: dict[str, T] = {}
        for name in order:
            found[name] = measure(name, random.Random(f"{seed} {number} {name}"))
            after_each()
        results.append({name: found[name] for name in names})
    return results


def ratio_to(bases: Sequence[str], name: str, figures: Sequence[Mapping[str, float]]) -> Ratio:
    """Ratio of an arm to others over the rounds.

    Args:
        bases: The arms to divide by; several count as their mean.
        name: The arm.
        figures: Figures by arm for each round.
    """
    values = np.array([one[name] / np.mean([one[base] for base in bases]) for one in figures])
    generator = np.random.default_rng(0)
    medians = np.median(generator.choice(values, (BOOTSTRAP, len(values))), axis=1)
    outside = (100.0 - CONFIDENCE) / 2
    low, high = np.percentile(medians, [outside, 100.0 - outside])
    return Ratio(float(np.median(values)), float(low), float(high))
