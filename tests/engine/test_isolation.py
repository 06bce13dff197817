"""A request gets in a mixed batch what it gets alone, and no steering where it asks for none."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest

from tests.engine.cases import CASES, SPIDERS
from vllm_steer.errors import EngineError
from vllm_steer.packs.pack import SteeringPack
from vllm_steer.packs.registry import PackRegistry
from vllm_steer.plan.binding import bind
from vllm_steer.plan.message import encode_plan
from vllm_steer.plan.resolve import resolve
from vllm_steer.request.schema import PLAN_KEY, SteeringRequest
from vllm_steer.testing.engine import Engine

pytestmark = pytest.mark.engine
TOKENS = 16
Start = Callable[[str], Engine]


@pytest.mark.parametrize("kind", ["eager", "compiled", "v2-eager"])
def test_mixed_batch_equals_alone(kind: str, start: Start, prompts: list[list[int]]) -> None:
    engine = start(kind)
    together = engine.generate(prompts, list(CASES.values()), TOKENS)
    for prompt, steering, output in zip(prompts, CASES.values(), together, strict=True):
        (alone,) = engine.generate([prompt], [steering], TOKENS)
        assert output.tokens == alone.tokens
        assert np.abs(output.logprobs - alone.logprobs).max() < 1e-5


@pytest.mark.parametrize("kind", ["eager", "compiled", "v2-eager"])
def test_unsteered_equals_an_engine_without_the_plugin(
    kind: str, start: Start, prompts: list[list[int]]
) -> None:
    zero = {"directions": [{"name": SPIDERS, "scale": 0.0}]}
    steerings = ([None, zero] * len(prompts))[: len(prompts)]
    ours = start(kind).generate(prompts, steerings, TOKENS)
    theirs = start(f"plain-{kind}").generate(prompts, [None] * len(prompts), TOKENS)
    for output, expected in zip(ours, theirs, strict=True):
        assert output.tokens == expected.tokens
        if kind != "compiled":
            assert np.array_equal(output.logprobs, expected.logprobs)
        else:
            assert np.abs(output.logprobs - expected.logprobs).max() < 1e-5


def test_a_refused_request_leaves_the_engine_serving(
    start: Start, prompts: list[list[int]]
) -> None:
    engine = start("eager")
    (before,) = engine.generate(prompts[:1], [None], TOKENS)
    with pytest.raises(EngineError, match="no direction 'spidres'; did you mean 'spiders'"):
        engine.generate(prompts[:1], [{"directions": [{"name": "fears/spidres"}]}], TOKENS)
    (after,) = engine.generate(prompts[:1], [None], TOKENS)
    assert np.array_equal(before.logprobs, after.logprobs)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda message: "nonsense",
        lambda message: message[:-1],
        lambda message: _changed(message, ("version", 0)),
        lambda message: _changed(message, ("more", 1)),
        lambda message: _changed(message, ("segments", 0, "terms", 0, "digest", "0" * 64)),
        lambda message: _changed(message, ("segments", 0, "terms", 0, "scale", math.inf)),
        lambda message: _changed(message, ("segments", 0, "terms", 0, "scale", 1e38)),
        lambda message: _changed(message, ("segments", 0, "terms", 0, "layers", "all")),
        lambda message: _changed(message, ("segments", 0, "terms", [])),
        lambda message: _changed(message, ("segments", 0, "start", -1)),
        lambda message: _changed(message, ("segments", 0, "end", 2**40)),
        lambda message: _changed(message, ("segments", 0, "end", 0)),
        lambda message: _changed(message, ("segments", 0, "stop", {"origin": 0, "tokens": []})),
    ],
    ids=[
        "text",
        "short",
        "another version",
        "unknown field",
        "unknown digest",
        "not finite",
        "further than a stream may be carried",
        "layers of another type",
        "no terms",
        "before the prompt",
        "past every position",
        "empty range",
        "no triggers",
    ],
)
def test_a_plan_that_cannot_be_carried_out_fails_its_request_alone(
    spoil: Callable[[bytes], Any],
    start: Start,
    prompts: list[list[int]],
    packs: list[SteeringPack],
) -> None:
    """A front end with other packs or a fault of its own must not take down the batch."""
    engine = start("eager")
    steering = {"directions": [{"name": SPIDERS, "scale": 6.0}]}
    request = SteeringRequest.model_validate(steering)
    plan = encode_plan(resolve(bind(request, PackRegistry(packs)), len(prompts[0])))
    engine.send_raw_plan(prompts[0], {PLAN_KEY: plan})
    (before,) = engine.generate(prompts[:1], [steering], TOKENS)
    with pytest.raises(EngineError, match="the request finished with 'error'"):
        engine.send_raw_plan(prompts[0], {PLAN_KEY: spoil(plan)})
    (after,) = engine.generate(prompts[:1], [steering], TOKENS)
    assert np.array_equal(before.logprobs, after.logprobs)


def _changed(message: bytes, change: tuple[Any, ...]) -> bytes:
    """The message with the value at a path, all of ``change`` but its last entry, replaced by that."""
    content = part = msgspec.msgpack.decode(message)
    *path, last, value = change
    for step in path:
        part = part[step]
    part[last] = value
    return msgspec.msgpack.encode(content)
