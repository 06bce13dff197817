"""Mixed HTTP traffic on a server, sent and timed by vLLM's own serving benchmark."""

from __future__ import annotations

import asyncio
import contextlib
import io
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.arms import Arm

SERVED_NAME = "bench"
PROMPTS = (16, 32, 64, 128, 256)
ANSWERS = (8, 16, 32, 64)


@dataclass(frozen=True)
class Traffic:
    """Requests of mixed lengths that arrive at random.

    Attributes:
        requests: Number of requests.
        rate: Requests a second, a Poisson process; infinite for all at once.
        prompts: Lengths of prompts to draw from.
        answers: Lengths of answers to draw from.
        concurrency: Most requests at a time; None for no limit.
    """

    requests: int
    rate: float
    prompts: tuple[int, ...] = PROMPTS
    answers: tuple[int, ...] = ANSWERS
    concurrency: int | None = None


@dataclass(frozen=True)
class Latency:
    """What the clients of one run saw, in milliseconds.

    Attributes:
        ttft: Median time to first token.
        ttft_p99: Its 99th percentile.
        tpot: Median time per token after the first; 0 where answers have one token.
        tokens_per_second: Generated tokens a second of the whole run.
        ttfts: Time to first token of each request.
    """

    ttft: float
    ttft_p99: float
    tpot: float
    tokens_per_second: float
    ttfts: list[float]


def send(
    url: str, model: str, traffic: Traffic, arm: Arm, vocabulary: int, rng: random.Random, seed: int
) -> Latency:
    """Sends the traffic of one arm and returns what its clients saw.

    Args:
        url: Base URL, ending in ``/v1``.
        model: Path of the model.
        traffic: The traffic.
        arm: Gives each request its steering.
        vocabulary: Tokens that prompts may use.
        rng: Source of the prompts' tokens and of the steering.
        seed: Decides lengths and arrivals; equal seeds give equal load.

    Raises:
        RuntimeError: A request failed.
    """
    from vllm.benchmarks.datasets import SampleRequest
    from vllm.benchmarks.serve import TaskType, benchmark

    lengths = random.Random(seed)
    requests = []
    for extra in arm.steering(traffic.requests, rng):
        prompt = [rng.randrange(3, vocabulary) for _ in range(lengths.choice(traffic.prompts))]
        requests.append(
            SampleRequest(
                prompt=prompt,
                prompt_len=len(prompt),
                expected_output_len=lengths.choice(traffic.answers),
                request_overrides=extra,
            )
        )
    # Arrivals are drawn from numpy's global state.
    np.random.seed(seed)
    settings: dict[str, Any] = {
        "task_type": TaskType.GENERATION,
        "endpoint_type": "openai",
        "api_url": f"{url}/completions",
        "base_url": url.removesuffix("/v1"),
        "model_id": model,
        "model_name": SERVED_NAME,
        "tokenizer": None,
        "input_requests": requests,
        "logprobs": None,
        "request_rate": traffic.rate,
        "burstiness": 1.0,
        "disable_tqdm": True,
        "num_warmups": 0,
        "profile": False,
        "selected_percentile_metrics": ["ttft", "tpot"],
        "selected_percentiles": [99.0],
        "ignore_eos": True,
        "goodput_config_dict": {},
        "max_concurrency": traffic.concurrency,
        "lora_modules": None,
        "extra_headers": None,
        "extra_body": {"temperature": 0.0},
        "ready_check_timeout_sec": 0,
    }
    # It prints a report of its own for each run.
    with contextlib.redirect_stdout(io.StringIO()):
        result = asyncio.run(benchmark(**settings))
    if result["completed"] != len(requests):
        raise RuntimeError(f"{result['failed']} requests failed: {_first_error(result['errors'])}")
    ttfts = 1000 * np.array(result["ttfts"])
    rest = 1000 * np.array(result["latencies"]) - ttfts
    more = np.array(result["output_lens"]) - 1
    # Its own summary of these needs a tokenizer, which token ids do without.
    tpots = rest[more > 0] / more[more > 0]
    return Latency(
        float(np.median(ttfts)),
        float(np.percentile(ttfts, 99)),
        float(np.median(tpots)) if len(tpots) else 0.0,
        result["output_throughput"],
        [round(ttft, 3) for ttft in ttfts.tolist()],
    )


def _first_error(errors: Sequence[str]) -> str:
    return next((error for error in errors if error), "no message")
