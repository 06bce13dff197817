"""The engine's outputs held against Hugging Face with forward hooks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from vllm_steer.testing.engine import Output
from vllm_steer.verify.oracle import Reference

TOLERANCE = 1e-4


def assert_equals_hooks(
    reference: Reference,
    prompts: Sequence[Sequence[int]],
    steerings: Iterable[dict[str, Any] | None],
    outputs: Sequence[Output],
    count: int,
) -> None:
    """Each greedy output has the reference's tokens, and its log-probabilities to 1e-4."""
    for prompt, steering, output in zip(prompts, steerings, outputs, strict=True):
        expected = reference.generate(prompt, steering, count)
        assert output.tokens == expected.tokens
        assert np.abs(output.logprobs - expected.logprobs).max() < TOLERANCE
