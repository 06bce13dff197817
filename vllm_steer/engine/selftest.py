"""The start-up self-test: every hooked block must really change the output.

A model may return a residual that nobody reads, a compiler may fold a buffer into a constant, a
cached graph may lack the addition: each would serve unsteered text without an error. So before
the engine takes requests, each hooked layer gets a non-zero row once and the final hidden states
must differ, by the very graph that will serve.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from vllm_steer.engine.worker import WorkerSteering
from vllm_steer.errors import CompatibilityError

NUM_TOKENS = 8


def run_self_test(steering: WorkerSteering, forward: Callable[[int], torch.Tensor]) -> None:
    """Proves that each hooked block steers.

    Args:
        steering: The worker's steering.
        forward: Runs the model on that many dummy tokens through the runner's own dummy run and
            returns its final hidden states ``[num_tokens, hidden_size]``.

    Raises:
        CompatibilityError: A block's row does not change the output, or the output is not finite.
    """
    num_tokens = min(NUM_TOKENS, steering.bank.rows.shape[0])
    generator = np.random.default_rng(0)
    hidden_size = steering.bank.hidden_size
    plain = _hidden(forward, num_tokens)
    if not torch.equal(plain, _hidden(forward, num_tokens)):
        raise CompatibilityError(
            "the steering self-test cannot judge this model: two equal dummy runs gave different hidden states"
        )
    for layer in steering.layers:
        direction = generator.standard_normal(hidden_size)
        values = np.zeros((len(steering.layers), hidden_size), dtype=np.float32)
        values[steering.bank.index[layer]] = (
            steering.residual_norm(layer) * direction / np.linalg.norm(direction)
        )
        with steering.probing(values):
            steered = _hidden(forward, num_tokens)
        if not torch.isfinite(steered).all():
            raise CompatibilityError(
                f"the steering self-test made layer {layer} overflow; the model cannot be steered"
            )
        untouched = (steered == plain).all(dim=-1)
        if untouched.any():
            raise CompatibilityError(
                f"the steering self-test added a vector after layer {layer} and {int(untouched.sum())} of {num_tokens} "
                f"tokens did not change: the model would run unsteered, so the engine does not start"
            )
    if not torch.equal(plain, _hidden(forward, num_tokens)):
        raise CompatibilityError(
            "the steering self-test left the model steered; the engine does not start"
        )


def _hidden(forward: Callable[[int], torch.Tensor], num_tokens: int) -> torch.Tensor:
    return forward(num_tokens)[:num_tokens].clone()
