"""Every affine form equals Hugging Face with hooks, all in one batch with additions and unsteered requests."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from tests.engine.cases import FORM_CASES
from vllm_steer.testing.engine import Engine, Output
from vllm_steer.testing.parity import TOLERANCE, assert_equals_hooks
from vllm_steer.verify.oracle import Reference

pytestmark = pytest.mark.engine
TOKENS = 24


@pytest.fixture(scope="module")
def form_prompts(prompts: list[list[int]]) -> dict[str, list[int]]:
    """A prompt for each case."""
    enough = prompts * (1 + len(FORM_CASES) // len(prompts))
    return dict(zip(FORM_CASES, enough, strict=False))


@pytest.fixture(
    scope="module",
    params=[
        "affine-eager",
        "affine-compiled",
        pytest.param("affine-v2-eager", marks=pytest.mark.slow),
    ],
)
def outputs(
    request: pytest.FixtureRequest,
    start: Callable[[str], Engine],
    form_prompts: dict[str, list[int]],
) -> dict[str, Output]:
    engine = start(request.param)
    batch = engine.generate(list(form_prompts.values()), list(FORM_CASES.values()), TOKENS)
    return dict(zip(FORM_CASES, batch, strict=True))


@pytest.mark.parametrize("case", FORM_CASES)
def test_equals_hooks(
    case: str,
    outputs: dict[str, Output],
    form_prompts: dict[str, list[int]],
    reference: Reference,
) -> None:
    assert_equals_hooks(
        reference, [form_prompts[case]], [FORM_CASES[case]], [outputs[case]], TOKENS
    )


def test_cases_can_fail(form_prompts: dict[str, list[int]], reference: Reference) -> None:
    """Each form moves the log-probabilities far more than the tolerance."""
    for name, steering in FORM_CASES.items():
        if steering is None:
            continue
        plain = reference.generate(form_prompts[name], None, TOKENS)
        changed = reference.generate(form_prompts[name], steering, TOKENS)
        assert np.abs(plain.logprobs - changed.logprobs).max() > 100 * TOLERANCE, name
