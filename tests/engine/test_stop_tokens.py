"""Steering ends after a generated token, whoever runs beside it and whatever the prefix cache holds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tests.engine.cases import CHEERFUL, SPIDERS
from vllm_steer.testing.engine import Engine
from vllm_steer.testing.parity import TOLERANCE, assert_equals_hooks
from vllm_steer.verify.oracle import Reference

pytestmark = pytest.mark.engine
TOKENS = 24
STEERINGS: list[dict[str, Any]] = [
    {"directions": [{"name": SPIDERS, "scale": 9.0}]},
    {"directions": [{"name": CHEERFUL, "scale": 8.0}], "positions": "generated"},
    {"directions": [{"name": CHEERFUL, "scale": 7.0, "positions": [[-3, None]]}]},
]


@pytest.fixture(scope="module")
def cases(prompts: list[list[int]], reference: Reference) -> list[tuple[list[int], dict[str, Any]]]:
    """Triggers that the steered answers are known to hold, early, late and first of all."""
    found = []
    for number, steering in enumerate(STEERINGS * 2):
        prompt = prompts[number]
        tokens = reference.generate(prompt, steering, TOKENS).tokens
        place = (0, 3, 9)[number // 2]
        # A token of the prompt is no trigger there.
        found.append((prompt, steering | {"until_token_ids": [tokens[place], prompt[0], 1]}))
    return found


@pytest.mark.parametrize(
    "kind",
    [
        "eager",
        pytest.param("v2-eager", marks=pytest.mark.slow),
        "async-eager",
        "ngram-eager",
        "cached-eager",
    ],
)
def test_equals_hooks(
    kind: str,
    start: Callable[[str], Engine],
    cases: list[tuple[list[int], dict[str, Any]]],
    prompts: list[list[int]],
    reference: Reference,
) -> None:
    asked = [prompt for prompt, _ in cases] + prompts[:2]
    steerings = [steering for _, steering in cases] + [None, STEERINGS[0]]
    engine = start(kind)
    for _ in range(2 if kind == "cached-eager" else 1):
        outputs = engine.generate(asked, steerings, TOKENS)
        assert_equals_hooks(reference, asked, steerings, outputs, TOKENS)


def test_triggers_matter(
    cases: list[tuple[list[int], dict[str, Any]]], reference: Reference
) -> None:
    for prompt, steering in cases:
        whole = {key: value for key, value in steering.items() if key != "until_token_ids"}
        ended = reference.generate(prompt, steering, TOKENS).logprobs
        assert np.abs(ended - reference.generate(prompt, whole, TOKENS).logprobs).max() > (
            100 * TOLERANCE
        )


def test_answers_that_end_alike_share_blocks_and_others_do_not(
    start: Callable[[str], Engine], prompts: list[list[int]], reference: Reference
) -> None:
    """A prompt that continues an answer finds its blocks exactly as far as they were steered alike."""
    engine, prompt = start("cached-eager"), prompts[7]
    steering = {"directions": [{"name": SPIDERS, "scale": 9.0}]}
    answer = engine.generate([prompt], [steering], 64)[0].tokens
    ending = steering | {"until_token_ids": [answer[20]]}
    expected = reference.generate(prompt, ending, 64)
    for _ in range(2):
        (output,) = engine.generate([prompt], [ending], 64)
        assert output.tokens == expected.tokens
        assert np.abs(output.logprobs - expected.logprobs).max() < TOLERANCE
    again = [*prompt, *expected.tokens]
    (output,) = engine.generate([again], [steering], 8)
    assert_equals_hooks(reference, [again], [steering], [output], 8)
    assert output.cached < len(prompt) + 20 + 32
