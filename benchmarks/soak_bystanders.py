"""Clients of the soak that do nothing wrong: their answers must be those of a quiet server."""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

import httpx

from benchmarks.soak_model import CALM, DIRECTIONS, LAYERS, Load
from vllm_steer.offline.demo.server import SERVED_NAME

KEY = "bystander"
CASES = 24
_VOCABULARY = (10, 1500)
# What two sums of the same numbers in another order may differ by, in log-probability.
TOLERANCES = {"float32": 1e-3, "bfloat16": 0.25, "float16": 0.05}


# And in score, where the residual stream is some hundreds long.
SCORE_FACTOR = 10.0


@dataclass(frozen=True)
class Answer:
    """Tokens with their log-probabilities, the lead of each over the next likely one, and the scores that were read."""

    tokens: tuple[str, ...]
    logprobs: tuple[float, ...]
    leads: tuple[float, ...]
    scores: tuple[float, ...] = ()

    def agrees(self, other: Answer, tolerance: float) -> bool:
        """Whether two answers are the same, up to a tie that the batch may decide."""
        scores = zip_longest(self.scores, other.scores, fillvalue=math.nan)
        for one, two, a, b, lead in zip(
            self.tokens, other.tokens, self.logprobs, other.logprobs, self.leads, strict=False
        ):
            if one != two:
                return lead <= tolerance
            if not abs(a - b) <= tolerance:
                return False
            here, there = next(scores, (0.0, 0.0))
            if not abs(here - there) <= SCORE_FACTOR * tolerance:
                return False
        return len(self.tokens) == len(other.tokens)


@dataclass
class Watch:
    """What the bystanders saw.

    Attributes:
        requests: Requests sent.
        wrong: What was wrong with an answer, in words.
        stuck: Requests that were not answered in time.
        errors: Answers with another status than 200, which are wrong too.
        waits: Seconds of each short steered request.
    """

    requests: int = 0
    wrong: list[str] = field(default_factory=list)
    stuck: int = 0
    errors: list[str] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)


def cases(seed: int, load: Load) -> list[dict[str, Any]]:
    """Returns bodies of unsteered and of steered requests, by turns."""
    rng = random.Random(f"bystanders {seed}")
    found = []
    for number in range(CASES):
        length = rng.choice([n for n in (3, 17, 40, 150) if n <= load.prompt])
        body: dict[str, Any] = {
            "model": SERVED_NAME,
            "prompt": [rng.randrange(*_VOCABULARY) for _ in range(length)],
            "max_tokens": min(rng.randint(4, 24), load.answers[-1]),
            "temperature": 0.0,
            "logprobs": 2,
            "ignore_eos": True,
        }
        if number % 2:
            choice = {"name": f"{CALM}/{rng.choice(DIRECTIONS)}", "scale": rng.uniform(1.0, 4.0)}
            where = rng.choice(["all", "prompt", "generated"])
            body["steering"] = {"directions": [choice], "positions": where}
        if number % 3 == 0:
            read = {"name": f"{CALM}/{rng.choice(DIRECTIONS)}", "layers": [1, LAYERS - 1]}
            body.setdefault("steering", {})["read"] = [read]
        found.append(body)
    return found


async def quiet_answers(http: httpx.AsyncClient, bodies: Sequence[dict[str, Any]]) -> list[Answer]:
    """Returns what the server says to each when nobody else asks."""
    answers = []
    for body in bodies:
        response = await http.post("/completions", json=body)
        response.raise_for_status()
        answers.append(_read(response.json()))
    return answers


async def stand_by(
    http: httpx.AsyncClient,
    bodies: Sequence[dict[str, Any]],
    answers: Sequence[Answer],
    watch: Watch,
    rng: random.Random,
    end: float,
    tolerance: float,
) -> None:
    """Asks one question after the other, and holds each answer against the quiet server's."""
    while time.monotonic() < end:
        number = rng.randrange(len(bodies))
        response = await ask(http, bodies[number], watch)
        if response is None:
            continue
        found = _read(response.json())
        if not answers[number].agrees(found, tolerance):
            watch.wrong.append(f"case {number}: {found.tokens} for {answers[number].tokens}")
        elif not all(map(math.isfinite, found.logprobs)):
            watch.wrong.append(f"case {number}: log-probabilities that are not finite")


async def wait_short(http: httpx.AsyncClient, watch: Watch, rng: random.Random, end: float) -> None:
    """Asks for two steered tokens again and again, and notes how long each takes."""
    while time.monotonic() < end:
        choice = {"name": f"{CALM}/{rng.choice(DIRECTIONS)}", "scale": rng.uniform(1.0, 4.0)}
        body = {
            "model": SERVED_NAME,
            "prompt": [rng.randrange(*_VOCABULARY) for _ in range(8)],
            "max_tokens": 2,
            "ignore_eos": True,
            "steering": {"directions": [choice]},
        }
        started = time.monotonic()
        if await ask(http, body, watch) is not None:
            watch.waits.append(time.monotonic() - started)
        await asyncio.sleep(rng.uniform(0.0, 0.3))


async def ask(http: httpx.AsyncClient, body: dict[str, Any], watch: Watch) -> httpx.Response | None:
    """Sends one request, and notes what went wrong; None unless it was answered with 200."""
    watch.requests += 1
    try:
        response = await http.post("/completions", json=body)
    except httpx.TimeoutException:
        watch.stuck += 1
        return None
    except httpx.HTTPError as error:
        watch.errors.append(repr(error))
        await asyncio.sleep(1.0)
        return None
    if response.status_code != 200:
        watch.errors.append(f"{response.status_code} {response.text[:300]}")
        return None
    return response


def _read(body: dict[str, Any]) -> Answer:
    found = body["choices"][0]["logprobs"]
    leads = []
    for top in found["top_logprobs"]:
        ranked = sorted(top.values(), reverse=True)
        leads.append(ranked[0] - ranked[1] if len(ranked) > 1 else math.inf)
    receipts = body.get("steering", [])
    reads = [read for receipt in receipts for read in receipt.get("reads", [])]
    # The last token has no score.
    scores = [score for read in reads for score in read["answers"][0]["generated"][:-1]]
    return Answer(
        tuple(found["tokens"]), tuple(found["token_logprobs"]), tuple(leads), tuple(scores)
    )
