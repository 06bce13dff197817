"""The keys of the prefix cache where steering ends after a trigger: right, and no slower for long prompts."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

from vllm_steer.engine.prefix_cache import steered_extra_keys
from vllm_steer.plan.message import encode_plan
from vllm_steer.plan.steering_plan import Segment, SteeringPlan, Term
from vllm_steer.request.schema import PLAN_KEY
from vllm_steer.request.stop_tokens import StopTokens, first_token

BLOCK = 16


class Counted(list[int]):
    """Tokens that know how often they are looked at."""

    looked = 0

    def __getitem__(self, at: Any) -> Any:
        self.looked += len(range(*at.indices(len(self)))) if isinstance(at, slice) else 1
        return super().__getitem__(at)


def request_of(tokens: Counted, stop: StopTokens) -> Any:
    segment = Segment(0, None, (Term("a" * 64, 1.0, (0,)),), stop)
    params = SimpleNamespace(extra_args={PLAN_KEY: encode_plan(SteeringPlan((segment,)))})
    return SimpleNamespace(sampling_params=params, all_token_ids=tokens)


def test_keys_tell_where_it_ended() -> None:
    extra_keys = steered_extra_keys(lambda request, start, end: [])
    rng = random.Random(0)
    for _ in range(200):
        origin = rng.randrange(40)
        stop, tokens = StopTokens(origin, (7, 9)), Counted()
        request = request_of(tokens, stop)
        # Blocks are hashed as they are filled, and an answer grows by some tokens at a time.
        done = 0
        for _ in range(12):
            tokens += [rng.randrange(40) for _ in range(rng.randrange(1, 40))]
            while done + BLOCK <= len(tokens):
                at = first_token(stop, list(tokens[: done + BLOCK]))
                last = done + BLOCK if at is None else min(done + BLOCK, at + 1)
                found = extra_keys(request, done, done + BLOCK)
                ends = [int(value.rpartition(":")[2]) for _, value in found]
                assert ends == ([last - done] if last > done else [])
                done += BLOCK


def test_each_token_is_looked_at_once() -> None:
    """A prompt of 131,000 tokens has 8,192 blocks."""
    extra_keys = steered_extra_keys(lambda request, start, end: [])
    tokens = Counted([1] * 131_072)
    request = request_of(tokens, StopTokens(1000, (7,)))
    for start in range(0, len(tokens), BLOCK):
        extra_keys(request, start, start + BLOCK)
    assert tokens.looked <= len(tokens)
