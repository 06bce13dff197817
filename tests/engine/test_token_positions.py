"""Steering by token id equals hooks, whoever runs beside it and whatever the prefix cache holds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tests.engine.cases import CHEERFUL, COLON, FULL_STOP, GLOOMY, NEWLINE, SPIDERS
from vllm_steer.testing.engine import Engine
from vllm_steer.testing.parity import TOLERANCE, assert_equals_hooks
from vllm_steer.verify.oracle import Reference

pytestmark = pytest.mark.engine
TOKENS = 24
BLOCK = 32
PLAIN: dict[str, Any] = {"directions": [{"name": SPIDERS, "scale": 9.0}]}


def _by(ids: list[int], *, onward: bool = False, **fields: Any) -> dict[str, Any]:
    return PLAIN | {"positions": {"from_tokens" if onward else "tokens": ids} | fields}


@pytest.fixture(scope="module")
def cases(prompts: list[list[int]], reference: Reference) -> list[tuple[list[int], dict[str, Any]]]:
    """Prompts with tokens that they have or whose steered answers are known to have, early and late."""
    found = [
        (prompts[0], _by([NEWLINE, FULL_STOP, COLON])),
        (prompts[1], _by([COLON], onward=True)),
        (
            prompts[2],
            {
                "directions": [
                    *PLAIN["directions"],
                    {"name": GLOOMY, "scale": 9.0, "positions": {"tokens": [NEWLINE]}},
                ],
                "positions": {"from_tokens": [FULL_STOP], "within": [[20, None]]},
            },
        ),
    ]
    for number, place in enumerate((0, 3, 9)):
        prompt = prompts[3 + number]
        answer = reference.generate(prompt, None, TOKENS).tokens
        # A token of the prompt counts in the prompt alone.
        ids = [answer[place], prompt[0]]
        found.append((prompt, _by(ids, onward=True, within="generated")))
        found.append((prompt, _by(ids, within={"generated": [place, None]})))
        steered = reference.generate(prompt, PLAIN, TOKENS).tokens
        until = {"until_token_ids": [steered[place]]}
        found.append((prompt, _by(prompt[3:4], onward=True) | until))
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
    steerings = [steering for _, steering in cases] + [None, PLAIN]
    engine = start(kind)
    for _ in range(2 if kind == "cached-eager" else 1):
        outputs = engine.generate(asked, steerings, TOKENS)
        assert_equals_hooks(reference, asked, steerings, outputs, TOKENS)


def test_tokens_matter(cases: list[tuple[list[int], dict[str, Any]]], reference: Reference) -> None:
    for prompt, steering in cases:
        found = reference.generate(prompt, steering, TOKENS).logprobs
        for other in (None, PLAIN):
            expected = reference.generate(prompt, other, TOKENS).logprobs
            assert np.abs(found - expected).max() > 100 * TOLERANCE, steering


def test_blocks_are_shared_exactly_where_tokens_decide_alike(
    start: Callable[[str], Engine], prompts: list[list[int]], reference: Reference
) -> None:
    engine = start("cached-eager")
    middle = [token for prompt in prompts[:3] for token in prompt]
    assert len(middle) > 2 * BLOCK
    late, absent = [token for token in range(300, 1600) if token not in middle][:2]
    # A token at the start that no other test has, and one in the third block alone.
    prompt = [4, *middle[: 2 * BLOCK], late, *middle]
    whole = (len(prompt) - 1) // BLOCK * BLOCK
    for steering, cached in (
        (None, 0),
        (_by([absent]), whole),
        # Up to the block with the token that it acts on.
        (_by([late]), 2 * BLOCK),
        (_by([late, absent]), whole),
        (_by([late], onward=True), 2 * BLOCK),
        (_by([late, absent], onward=True), whole),
        (PLAIN, 0),
        (PLAIN | {"positions": [[2 * BLOCK + 1, None]]}, whole),
    ):
        (output,) = engine.generate([prompt], [steering], 8)
        assert output.cached == cached, steering
        assert_equals_hooks(reference, [prompt], [steering], [output], 8)


def test_what_an_answer_said_counts_when_it_is_sent_again(
    start: Callable[[str], Engine], prompts: list[list[int]], reference: Reference
) -> None:
    """A prompt that continues an answer finds its blocks exactly as far as they were steered alike."""
    engine, prompt = start("cached-eager"), prompts[8]
    answer = reference.generate(prompt, None, 64).tokens
    first = answer.index(answer[20])
    steering = {
        "directions": [{"name": CHEERFUL, "scale": 8.0}],
        "positions": {"from_tokens": [answer[20]], "within": "generated"},
    }
    expected = reference.generate(prompt, steering, 64)
    (output,) = engine.generate([prompt], [steering], 64)
    assert_equals_hooks(reference, [prompt], [steering], [output], 64)
    again = [*prompt, *expected.tokens]
    whole = (len(again) - 1) // BLOCK * BLOCK
    # Without steering, as far as none acted; then, nothing counts of what is a prompt now.
    for second, cached in ((None, (len(prompt) + first) // BLOCK * BLOCK), (steering, whole)):
        (output,) = engine.generate([again], [second], 8)
        assert_equals_hooks(reference, [again], [second], [output], 8)
        assert output.cached == cached
