"""The engine steered with a pack equals Hugging Face with hooks, batched, eager and compiled."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from tests.engine.cases import CASES
from vllm_steer.testing.engine import Engine, Output
from vllm_steer.testing.parity import TOLERANCE, assert_equals_hooks
from vllm_steer.verify.oracle import Reference

pytestmark = pytest.mark.engine
TOKENS = 24


@pytest.fixture(scope="module", params=["eager", "compiled", "v2-eager"])
def outputs(
    request: pytest.FixtureRequest,
    start: Callable[[str], Engine],
    prompts: list[list[int]],
) -> dict[str, Output]:
    """All cases in one batch."""
    batch = start(request.param).generate(prompts, list(CASES.values()), TOKENS)
    return dict(zip(CASES, batch, strict=True))


@pytest.mark.parametrize("case", CASES)
def test_equals_hooks(
    case: str, outputs: dict[str, Output], prompts: list[list[int]], reference: Reference
) -> None:
    prompt = prompts[list(CASES).index(case)]
    assert_equals_hooks(reference, [prompt], [CASES[case]], [outputs[case]], TOKENS)


def test_cases_can_fail(prompts: list[list[int]], reference: Reference) -> None:
    """Each steering moves the log-probabilities far more than the tolerance."""
    for prompt, (name, steering) in zip(prompts, CASES.items(), strict=True):
        if steering is None:
            continue
        plain = reference.generate(prompt, None, TOKENS)
        steered = reference.generate(prompt, steering, TOKENS)
        assert np.abs(plain.logprobs - steered.logprobs).max() > 100 * TOLERANCE, name
