"""The startup self-test: every hooked block must change the output.

A model may return an unused residual, a compiler may fold a buffer into a constant, a cached graph may lack
the addition: each would serve unsteered text without an error. So before the engine takes requests, each
hooked layer gets a nonzero row once and the final hidden states must differ, with the same graph that will
serve. With the affine form, so must each of its tensors. With reads, the scores of a layer must show the
vector added there.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch

from vllm_steer.engine.reading import Reading
from vllm_steer.engine.row_values import ALWAYS, BIAS, SHARE, SLOPE, THRESHOLD
from vllm_steer.engine.worker import WorkerSteering
from vllm_steer.errors import CompatibilityError

NUM_TOKENS = 8
# Tolerance relative to the added length; half precision rounds both vectors.
_READ_TOLERANCE = 0.02


def run_self_test(steering: WorkerSteering, forward: Callable[[int], torch.Tensor]) -> None:
    """Proves that each hooked block steers.

    Args:
        steering: The worker's steering.
        forward: Runs the model on a number of dummy tokens through the runner's dummy run and returns its
            final hidden states ``[num_tokens, hidden_size]``.

    Raises:
        CompatibilityError: A block's row does not change the output, or changes it when it must not, or the
            output is not finite.
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
        values = steering.no_values()
        values.vectors[steering.bank.index[layer]] = (
            steering.residual_norm(layer) * direction / np.linalg.norm(direction)
        )
        with steering.probing(values):
            steered = _hidden(forward, num_tokens)
            if steering.reading is not None:
                _test_reads(steering, steering.reading, forward, layer, direction)
        _must_differ(steered, plain, layer, "added a vector")
        if steering.bank.rank:
            _test_forms(steering, forward, layer, plain, generator)
    if not torch.equal(plain, _hidden(forward, num_tokens)):
        raise CompatibilityError(
            "the steering self-test left the model steered; the engine does not start"
        )


def _test_forms(
    steering: WorkerSteering,
    forward: Callable[[int], torch.Tensor],
    layer: int,
    plain: torch.Tensor,
    generator: np.random.Generator,
) -> None:
    """Proves that each tensor of the affine form reaches the graph at one layer.

    If there is an earlier hooked layer, a vector is added there, since the stream of a dummy run may be zero
    until then; so the first layer's reader and factors are not proven.
    """
    at, norm, rank = steering.bank.index[layer], steering.residual_norm(layer), steering.bank.rank

    def vectors(count: int, length: float) -> np.ndarray:
        drawn = generator.standard_normal((count, steering.bank.hidden_size))
        drawn *= length / np.linalg.norm(drawn, axis=-1, keepdims=True)
        return drawn

    def hidden(factor: float = 1.0) -> torch.Tensor:
        with steering.probing(values, factor):
            return _hidden(forward, len(plain))

    values = steering.no_values()
    if at:
        values.vectors[at - 1] = vectors(1, norm)[0]
    before = hidden()
    values.left[at], values.numbers[at, BIAS] = vectors(rank, norm), 1.0
    values.numbers[at, THRESHOLD] = ALWAYS
    # The length of a standard normal vector of this size over the norm, so the reader's result is about 1.
    values.readers[at, :rank] = vectors(rank, math.sqrt(steering.bank.hidden_size) / norm)
    changed = hidden()
    _must_differ(changed, before, layer, "moved components")
    _must_equal(hidden(factor=0.0), plain, layer, "gave a change the factor 0")
    if at:
        values.readers[at] *= -1.0
        _must_differ(hidden(), changed, layer, "read components")
        values.readers[at] *= -1.0
    values.restore[at] = 1.0
    _must_differ(hidden(), changed, layer, "restored a length")
    values.restore[at], values.numbers[at, SLOPE] = 0.0, 1.0
    _must_differ(hidden(), changed, layer, "softened a gate")
    values.numbers[at, THRESHOLD], values.numbers[at, SLOPE] = -ALWAYS, 0.0
    _must_equal(hidden(), before, layer, "closed a gate")
    if steering.bank.multiply and at:
        size = math.sqrt(steering.bank.hidden_size)
        values.diagonal[at], values.numbers[at, SHARE, 0] = vectors(1, size)[0], 1.0
        _must_equal(hidden(), before, layer, "closed a gate of factors")
        values.numbers[at, THRESHOLD] = ALWAYS
        values.numbers[at, BIAS], values.readers[at] = 0.0, 0.0
        _must_differ(hidden(), before, layer, "multiplied dimensions")


def _test_reads(
    steering: WorkerSteering,
    reading: Reading,
    forward: Callable[[int], torch.Tensor],
    layer: int,
    direction: np.ndarray,
) -> None:
    """Proves that scores reach their buffer at a layer where a vector along ``direction`` is added."""
    unit, norm = direction / np.linalg.norm(direction), steering.residual_norm(layer)
    num_tokens, found = min(NUM_TOKENS, steering.bank.rows.shape[0]), []
    for after in (False, True):
        with reading.probing(layer, unit.astype(np.float32), after=after) as scores:
            scores.fill_(math.nan)
            forward(num_tokens)
            found.append(scores[:num_tokens].clone())
    before, changed = found
    wrong = ((changed - before - norm).abs() > _READ_TOLERANCE * norm) | changed.isnan()
    if wrong.any():
        raise CompatibilityError(
            f"the steering self-test added a vector of length {norm:.3g} after layer {layer} and read it along that "
            f"vector: scores of {int(wrong.any(dim=-1).sum())} of {num_tokens} tokens do not show it, so the engine does "
            f"not start; leave out --steering-reads"
        )


def _must_differ(found: torch.Tensor, other: torch.Tensor, layer: int, done: str) -> None:
    if not torch.isfinite(found).all():
        raise CompatibilityError(
            f"the steering self-test made layer {layer} overflow; the model cannot be steered"
        )
    untouched = (found == other).all(dim=-1)
    if untouched.any():
        raise CompatibilityError(
            f"the steering self-test {done} after layer {layer} and {int(untouched.sum())} of {len(found)} "
            f"tokens did not change: the model would run unsteered, so the engine does not start"
        )


def _must_equal(found: torch.Tensor, other: torch.Tensor, layer: int, done: str) -> None:
    if not torch.equal(found, other):
        raise CompatibilityError(
            f"the steering self-test {done} after layer {layer} and the output changed; the engine does not start"
        )


def _hidden(forward: Callable[[int], torch.Tensor], num_tokens: int) -> torch.Tensor:
    return forward(num_tokens)[:num_tokens].clone()
