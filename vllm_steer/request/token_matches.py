"""Positions that the tokens decide: those with given ids, or all from the first of them on.

Imports neither torch nor vllm.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

# Different matches of one plan; their states are the bits of a number.
MAX_MATCHES = 4


@dataclass(frozen=True)
class TokenMatch:
    """Which tokens a direction acts on, within the ranges of its positions.

    Attributes:
        origin: Absolute position from which on tokens count.
        tokens: Token ids, ascending.
        onward: Whether it acts on the first of them and on all tokens that follow; otherwise on these tokens alone.
    """

    origin: int
    tokens: tuple[int, ...]
    onward: bool

    @cached_property
    def ids(self) -> frozenset[int]:
        """The token ids, for look-ups."""
        return frozenset(self.tokens)


def match_states(matches: Sequence[TokenMatch], tokens: Sequence[int]) -> np.ndarray:
    """Returns which matches hold at each token.

    Args:
        matches: The matches, at most ``MAX_MATCHES``.
        tokens: All tokens of a request so far, from the prompt's first.

    Returns:
        int32 ``[tokens]``; bit k is set where match k holds.
    """
    given = np.asarray(tokens, dtype=np.int64)
    states = np.zeros(len(given), dtype=np.int32)
    for number, match in enumerate(matches):
        found = np.isin(given, match.tokens) & (np.arange(len(given)) >= match.origin)
        if match.onward:
            found = np.logical_or.accumulate(found)
        states |= found.astype(np.int32) << number
    return states
