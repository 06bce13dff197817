"""Greedy answers of two engines on the same requests: equal, or apart only where two tokens tie."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Answer = tuple[list[int], list[dict[int, float]]]


def compare_greedy(
    answers: Sequence[Answer], expected: Sequence[Answer], tolerance: float
) -> dict[str, Any]:
    """Compares answers token by token, up to the first difference of each.

    After a difference the two contexts are different ones, so nothing behind it can be compared.

    Args:
        answers: Tokens and their best log-probabilities, by request.
        expected: Those of the other engine.
        tolerance: Largest difference of log-probability between two tokens that count as a tie:
            what rounding makes of the model's dtype.

    Returns:
        How many requests are equal, the gap at each difference (as ``expected`` sees it), the
        largest difference of a log-probability where tokens are equal, and whether all is well.
    """
    gaps, worst = [], 0.0
    for (tokens, rows), (wanted, wanted_rows) in zip(answers, expected, strict=True):
        for token, row, other, other_row in zip(tokens, rows, wanted, wanted_rows, strict=True):
            if token != other:
                gaps.append(other_row[other] - other_row.get(token, float("-inf")))
                break
            worst = max(worst, abs(row[token] - other_row[other]))
    return {
        "requests": len(answers),
        "equal": len(answers) - len(gaps),
        "gaps": [round(gap, 5) for gap in gaps],
        "logprob_difference": worst,
        "passed": all(gap <= tolerance for gap in gaps) and worst <= tolerance,
    }
