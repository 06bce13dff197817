"""The prefix cache never mixes keys and values of different steering."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tests.engine.cases import HEIGHTS, SPIDERS
from vllm_steer.testing.engine import Engine

pytestmark = pytest.mark.engine
TOKENS = 8
BLOCK = 32

ALL: dict[str, Any] = {"directions": [{"name": SPIDERS, "scale": 6.0}]}
OTHER_SCALE: dict[str, Any] = {"directions": [{"name": SPIDERS, "scale": 5.0}]}
OTHER: dict[str, Any] = {"directions": [{"name": HEIGHTS, "scale": 6.0}]}
GENERATED: dict[str, Any] = {
    "directions": [{"name": SPIDERS, "scale": 6.0}],
    "positions": "generated",
}
ZERO: dict[str, Any] = {"directions": [{"name": SPIDERS, "scale": 0.0}]}


PAIRS: list[tuple[dict[str, Any] | None, dict[str, Any] | None, bool]] = [
    (None, ALL, False),
    (ALL, None, False),
    (ALL, OTHER_SCALE, False),
    (ALL, OTHER, False),
    (ALL, ALL, True),
    (None, None, True),
    (None, GENERATED, True),
    (GENERATED, None, True),
    (ZERO, None, True),
    (ALL, GENERATED, False),
]


@pytest.mark.feature("prefix cache", "exact, keyed by content")
@pytest.mark.parametrize("number", range(len(PAIRS)))
def test_blocks_are_shared_only_by_equal_steering(
    number: int, start: Callable[[str], Engine], prompts: list[list[int]]
) -> None:
    first, second, shared = PAIRS[number]
    engine = start("cached-eager")
    # A beginning of its own gives each case prompts that no other case has cached.
    prompt = [5 + number, *prompts[0], *prompts[1]]
    engine.generate([prompt], [first], TOKENS)
    (output,) = engine.generate([prompt], [second], TOKENS)
    assert output.cached == ((len(prompt) - 1) // BLOCK * BLOCK if shared else 0)
    (expected,) = start("eager").generate([prompt], [second], TOKENS)
    assert output.tokens == expected.tokens
    assert np.abs(output.logprobs - expected.logprobs).max() < 1e-5


@pytest.mark.feature("prefix cache", "exact, keyed by content")
def test_evicted_blocks_are_computed_again(
    start: Callable[[str], Engine], prompts: list[list[int]]
) -> None:
    engine = start("cached-tiny-eager")
    prompt = [3, *(token for each in prompts for token in each)][:200]
    whole = (len(prompt) - 1) // BLOCK * BLOCK
    # Every other request has the same tokens, so that a wrong hit would be a likely one.
    others = [OTHER, None, GENERATED, OTHER_SCALE]
    cached = []
    for steering in (ALL, ALL, *others, ALL, ALL):
        (output,) = engine.generate([prompt], [steering], TOKENS)
        (expected,) = start("eager").generate([prompt], [steering], TOKENS)
        assert output.tokens == expected.tokens
        assert np.abs(output.logprobs - expected.logprobs).max() < 1e-5
        cached.append(output.cached)
    assert cached[:2] == [0, whole]
    # Blocks are evicted from a request's end, so some of its first ones may still be there.
    assert cached[-2] < whole
    assert cached[-1] == whole
