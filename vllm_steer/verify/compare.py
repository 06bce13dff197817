"""Differences between answers, and the tolerance for rounding.

In half precision two computations of the same thing choose different tokens where the best two nearly tie, so
answers are compared up to where they diverge, and with the reference by the log-probabilities of given
tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vllm_steer.verify.engine_calls import Answer


@dataclass(frozen=True)
class Tolerance:
    """Tolerance for rounding.

    Attributes:
        largest: Largest difference of a log-probability, in nats; two tokens that lie within it tie.
        mean: Largest mean difference.
    """

    largest: float
    mean: float


# Logits of 16 to 32 are 2^-3 apart in bfloat16 and 2^-6 in float16, and earlier layers round too: four steps
# at most over thousands of values, less than half a step on average.
_HALF = {"bfloat16": Tolerance(0.5, 0.05), "float16": Tolerance(0.0625, 0.00625)}
_FLOAT32 = Tolerance(1e-4, 5e-5)


def tolerance(dtype: str, device: str) -> Tolerance:
    """Returns the tolerance for a device and dtype.

    Args:
        dtype: As the engine names it.
        device: ``cpu`` or the name of an accelerator.
    """
    if dtype != "float32":
        return _HALF.get(dtype, _HALF["bfloat16"])
    # Accelerator kernels multiply float32 in TF32, which has float16's mantissa.
    return _FLOAT32 if device == "cpu" else _HALF["float16"]


@dataclass(frozen=True, eq=False)
class Difference:
    """The difference between two answers.

    Attributes:
        values: Absolute differences of log-probabilities, in nats.
        gaps: At each token that differs, the difference of the two log-probabilities.
        tokens: Tokens compared.
    """

    values: NDArray[np.float64]
    gaps: tuple[float, ...]
    tokens: int

    @property
    def largest(self) -> float:
        """Largest difference of a log-probability."""
        return float(self.values.max(initial=0.0))

    @property
    def mean(self) -> float:
        """Mean difference of the log-probabilities."""
        return float(self.values.mean()) if self.values.size else 0.0

    def fault(self, allowed: Tolerance) -> str | None:
        """Describes a difference beyond rounding, or None."""
        # Written so that a NaN is a fault.
        if not self.largest <= allowed.largest:
            return f"a log-probability differs by {self.largest:.2g}"
        if not self.mean <= allowed.mean:
            return f"log-probabilities differ by {self.mean:.2g} on average"
        if not all(gap <= allowed.largest for gap in self.gaps):
            return f"another token, {max(self.gaps):.2g} less likely"
        return None


def joined(differences: Iterable[Difference]) -> Difference:
    """All differences as one."""
    parts = list(differences)
    return Difference(
        np.concatenate([np.empty(0), *(part.values for part in parts)]),
        tuple(gap for part in parts for gap in part.gaps),
        sum(part.tokens for part in parts),
    )


def to_reference(answer: Answer, logprobs: NDArray[np.float32]) -> Difference:
    """Compares an answer with the reference's log-probabilities after the same tokens.

    If every token is the reference's best after those before it, the reference generates the same tokens by
    itself.

    Args:
        answer: The engine's answer.
        logprobs: ``[tokens, vocabulary]``, of the token at each place.
    """
    values = [
        abs(value - float(row[token]))
        for given, row in zip(answer.logprobs, logprobs, strict=True)
        for token, value in given.items()
    ]
    gaps = [
        float(row.max() - row[token])
        for token, row in zip(answer.tokens, logprobs, strict=True)
        if token != row.argmax()
    ]
    return Difference(np.array(values), tuple(gaps), len(answer.tokens))


def between(one: Answer, other: Answer) -> Difference:
    """Compares two answers to the same prompt up to the token where they diverge.

    After it the contexts differ, so nothing can be compared.
    """
    values: list[float] = []
    for place, (token, wanted) in enumerate(zip(one.tokens, other.tokens, strict=True)):
        row, wanted_row = one.logprobs[place], other.logprobs[place]
        values += [abs(row[key] - wanted_row[key]) for key in row.keys() & wanted_row.keys()]
        if token != wanted:
            # Both rows hold the best log-probabilities; a token not among them is far off.
            gap = max(
                row[token] - row.get(wanted, -np.inf),
                wanted_row[wanted] - wanted_row.get(token, -np.inf),
            )
            return Difference(np.array(values), (gap,), place + 1)
    return Difference(np.array(values), (), len(one.tokens))
