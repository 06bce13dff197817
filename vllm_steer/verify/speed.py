"""Throughput of plain vLLM, of the idle plugin, and with all requests steered, compared."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Sequence

from vllm_steer.verify.cases import REQUESTS, Directions
from vllm_steer.verify.engine_calls import Timing, time_batch
from vllm_steer.verify.interleave import Ratio, ratio_to, rounds
from vllm_steer.verify.process import EngineProcess
from vllm_steer.verify.report import Check, judged

OVERHEAD = "overhead"
PROMPT, ANSWER = 16, 64
ROUNDS = 7
PLAIN, IDLE, STEERED = "plain", "idle", "steered"
ARMS = (PLAIN, IDLE, STEERED)


def check_overhead(
    plain: EngineProcess,
    steered: EngineProcess,
    directions: Directions,
    vocabulary: Sequence[int],
    least: float | None,
    step: Callable[[str], None],
) -> Check:
    """Times the arms in rounds, each arm once a round in random order.

    Args:
        plain: Plain vLLM.
        steered: An engine with the plugin.
        directions: The directions.
        vocabulary: Tokens of random prompts.
        least: Smallest median ratio to plain vLLM that passes; None for no requirement.
        step: Called with the name of each next step.
    """
    steering = {"steering": directions.steer()}
    asked = {PLAIN: None, IDLE: None, STEERED: steering}

    def run(arm: str, rng: random.Random) -> Timing:
        step(f"overhead: {arm}")
        prompts = [rng.choices(vocabulary, k=PROMPT) for _ in range(REQUESTS)]
        engine = plain if arm == PLAIN else steered
        return engine.call(time_batch, prompts, [asked[arm]] * REQUESTS, ANSWER)

    # The first round warms up.
    rounds(ARMS, run, 1, 1, lambda: None)
    times = rounds(ARMS, run, ROUNDS, 0, lambda: None)
    speeds = [{arm: timing.speed for arm, timing in one.items()} for one in times]
    ratios = {arm: ratio_to([PLAIN], arm, speeds) for arm in (IDLE, STEERED)}
    medians = {arm: statistics.median(one[arm] for one in speeds) for arm in ARMS}
    summary = (
        f"tokens per second, {REQUESTS} requests of {PROMPT} + {ANSWER} tokens, median of {ROUNDS} interleaved "
        f"rounds: {medians[PLAIN]:.0f} plain; {medians[IDLE]:.0f} with the plugin idle, ratio {_shown(ratios[IDLE])}; "
        f"{medians[STEERED]:.0f} all steered, ratio {_shown(ratios[STEERED])}. Brackets are 95 % intervals over these "
        f"rounds; another start of the same engines may differ by a few percent more."
    )
    figures = {
        "tokens_per_second": medians,
        "ratios": {arm: ratio.as_dict() for arm, ratio in ratios.items()},
        "rounds": speeds,
        "least_ratio": least,
    }
    if least is None:
        return Check(OVERHEAD, "measured", summary, figures)
    faults = [
        f"ratio of {arm} {ratio.median:.3f} is below --min-ratio {least:g}"
        for arm, ratio in ratios.items()
        if not ratio.median >= least
    ]
    return judged(OVERHEAD, faults, summary, figures)


def steps() -> int:
    """Number of calls of ``step``."""
    return len(ARMS) * (ROUNDS + 1)


def _shown(ratio: Ratio) -> str:
    return f"{ratio.median:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]"
