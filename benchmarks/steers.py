"""Does an engine really steer? A speed means nothing before that is known."""

from __future__ import annotations

import random
from dataclasses import dataclass

from benchmarks.arms import Arm, Workload
from benchmarks.engine import answers_of
from vllm_steer.verify.process import EngineProcess

PROMPTS = 4
TOKENS = 8


@dataclass(frozen=True)
class Verdict:
    """What a strong vector did.

    Attributes:
        steers: Whether every steered answer differs from the unsteered one.
        told: What was seen, in words.
    """

    steers: bool
    told: str


def check_steers(engine: EngineProcess, strong: Arm, vocabulary: int) -> Verdict:
    """Compares answers to the same prompts with and without a strong vector.

    Args:
        engine: The engine.
        strong: Steers every request by a vector that no answer can ignore.
        vocabulary: Tokens that prompts may use.
    """
    work = Workload("check", PROMPTS, 12, TOKENS)
    prompts = work.prompts(vocabulary, random.Random(0))
    plain = answers_of(engine, prompts, [None] * PROMPTS, TOKENS)
    steered = answers_of(engine, prompts, strong.steering(PROMPTS, random.Random(0)), TOKENS)
    changed = sum(before != after for before, after in zip(plain, steered, strict=True))
    tokens = sum(before[0] != after[0] for before, after in zip(plain, steered, strict=True))
    if changed == PROMPTS:
        return Verdict(True, f"steers: a strong vector changed {tokens} of {PROMPTS} answers")
    if changed:
        return Verdict(
            False, f"steers {changed} of {PROMPTS} requests alone, so its speed is of no use"
        )
    return Verdict(
        False, "accepts the request and returns unsteered tokens and log-probabilities: no speed"
    )
