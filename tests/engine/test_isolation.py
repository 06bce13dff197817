"""A request gets in a mixed batch what it gets alone, and no steering where it asks for none."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from tests.engine.cases import CASES, SPIDERS
from tests.engine_process import EngineProcess

pytestmark = pytest.mark.engine
TOKENS = 16
Start = Callable[[str], EngineProcess]


@pytest.mark.parametrize("kind", ["eager", "compiled"])
def test_mixed_batch_equals_alone(kind: str, start: Start, prompts: list[list[int]]) -> None:
    engine = start(kind)
    together = engine.generate(prompts, list(CASES.values()), TOKENS)
    for prompt, steering, output in zip(prompts, CASES.values(), together, strict=True):
        (alone,) = engine.generate([prompt], [steering], TOKENS)
        assert output.tokens == alone.tokens
        assert np.abs(output.logprobs - alone.logprobs).max() < 1e-5


@pytest.mark.parametrize("kind", ["eager", "compiled"])
def test_unsteered_equals_an_engine_without_the_plugin(
    kind: str, start: Start, prompts: list[list[int]]
) -> None:
    zero = {"directions": [{"name": SPIDERS, "scale": 0.0}]}
    steerings = [None, zero] * (len(prompts) // 2)
    ours = start(kind).generate(prompts, steerings, TOKENS)
    theirs = start(f"plain-{kind}").generate(prompts, [None] * len(prompts), TOKENS)
    for output, expected in zip(ours, theirs, strict=True):
        assert output.tokens == expected.tokens
        if kind == "eager":
            assert np.array_equal(output.logprobs, expected.logprobs)
        else:
            assert np.abs(output.logprobs - expected.logprobs).max() < 1e-5


def test_a_refused_request_leaves_the_engine_serving(
    start: Start, prompts: list[list[int]]
) -> None:
    engine = start("eager")
    (before,) = engine.generate(prompts[:1], [None], TOKENS)
    with pytest.raises(RuntimeError, match="no direction 'spidres'; did you mean 'spiders'"):
        engine.generate(prompts[:1], [{"directions": [{"name": "fears/spidres"}]}], TOKENS)
    (after,) = engine.generate(prompts[:1], [None], TOKENS)
    assert np.array_equal(before.logprobs, after.logprobs)
