"""Tokens that end the steering of a request. Imports neither torch nor vllm."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

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


def stop_position(stop: StopTokens | None, tokens: Sequence[int]) -> int | None:
    """Returns the position of the first trigger, the last steered position; None without one.

    Args:
        stop: The triggers.
        tokens: All tokens of the request so far, from the prompt's first.
    """
    if stop is None:
        return None
    triggers = set(stop.tokens)
    generated = range(stop.origin, len(tokens))
    return next((position for position in generated if tokens[position] in triggers), None)
