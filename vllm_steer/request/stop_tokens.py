"""Tokens that end the steering of a request. Imports neither torch nor vllm."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Protocol

from pydantic import Field

MAX_TRIGGERS = 8

TokenIds = Annotated[
    list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1, max_length=MAX_TRIGGERS)
]


@dataclass(frozen=True)
class StopTokens:
    """The triggers of one request.

    Attributes:
        origin: Absolute position of the first generated token; triggers in the prompt do not count.
        tokens: Token ids, at most ``MAX_TRIGGERS``.
    """

    origin: int
    tokens: tuple[int, ...]

    @cached_property
    def ids(self) -> frozenset[int]:
        """The token ids, for look-ups."""
        return frozenset(self.tokens)


class Wanted(Protocol):
    """Tokens that count from a position on."""

    @property
    def origin(self) -> int:
        """Absolute position from which on they count."""

    @property
    def ids(self) -> frozenset[int]:
        """Their ids."""


def first_token(wanted: Wanted, tokens: Sequence[int]) -> int | None:
    """Returns the position of the first of some tokens; None without one.

    Args:
        wanted: The tokens that are looked for; of triggers, the position is the last steered one.
        tokens: All tokens of the request so far, from the prompt's first.
    """
    counted = range(wanted.origin, len(tokens))
    return next((position for position in counted if tokens[position] in wanted.ids), None)
