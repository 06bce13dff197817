"""Receipts in responses: what they hold is bounded, and other clients are answered while it is written."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from vllm_steer.plan.reads import Read
from vllm_steer.plan.scores import Scores
from vllm_steer.plan.steering_plan import SteeringPlan
from vllm_steer.serving import middleware
from vllm_steer.serving.http_context import HttpContext
from vllm_steer.serving.middleware import SteeringMiddleware
from vllm_steer.serving.receipt import LimitedPlan, Receipt
from vllm_steer.serving.responses import Receipts

PROMPT, READS = 2000, 32


def receipt(answers: int, prompt_len: int = PROMPT) -> Receipt:
    reads = tuple(Read(f"p/{n}", "digest", (1,), False, ((0, None),)) for n in range(READS))
    made = Receipt.of(LimitedPlan(SteeringPlan((), reads), 0.0), {}, prompt_len, answers)
    for index in range(answers):
        made.answered[index] = 1
        made.scores[index] = Scores(reads, prompt_len)
        made.scores[index].add(0, np.full((prompt_len, READS), 0.5, dtype=np.float32))
    return made


def answered(http_context: HttpContext, kind: str, *bodies: str) -> tuple[str, int]:
    """What a client gets, and how often others had their turn meanwhile."""
    got: list[bytes] = []
    turns = 0

    async def send(message: Any) -> None:
        got.append(message.get("body", b""))

    async def others() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0)
            turns += 1

    async def run() -> None:
        beside = asyncio.ensure_future(others())
        receipts = Receipts(send, http_context)
        headers = [(b"content-type", kind.encode())]
        await receipts.send({"type": "http.response.start", "status": 200, "headers": headers})
        for number, body in enumerate(bodies):
            more = number + 1 < len(bodies)
            message = {"type": "http.response.body", "body": body.encode(), "more_body": more}
            await receipts.send(message)
        beside.cancel()

    asyncio.run(run())
    return b"".join(got).decode(), turns


@pytest.mark.parametrize("kind", ["application/json", "text/event-stream"])
@pytest.mark.parametrize("route", ["chat", "responses", "messages"])
def test_others_have_their_turn_while_many_scores_are_written(kind: str, route: str) -> None:
    http_context = HttpContext(route, receipts=[receipt(answers=4)])
    body: dict[str, Any] = {"id": "1", "é": "\n\n \ud7ff"}
    streamed = {
        "chat": {"choices": [{"index": 1, "finish_reason": "stop"}]},
        "responses": {"type": "response.completed", "response": body},
        "messages": {"type": "message_stop"},
    }[route]
    if kind == "application/json":
        text, turns = answered(http_context, kind, json.dumps(body, ensure_ascii=False))
        found = json.loads(text)
        assert found | body == found
    else:
        event = f"event: x\ndata: {json.dumps(streamed)}\n\n"
        text, turns = answered(http_context, kind, event, "data: [DONE]\n\n")
        assert text.endswith("data: [DONE]\n\n")
        found = json.loads(text.splitlines()[1].removeprefix("data: "))
        found = found.get("response", found)
    scores = found["steering"][0]["reads"][READS - 1]["answers"][-1]
    assert scores["prompt"] == [0.5] * PROMPT
    assert scores["generated"] == [None]
    assert turns > 10


def test_stored_receipts_are_bounded_by_their_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are kept for answers that vLLM keeps, which it does where a variable says so."""
    stored = SteeringMiddleware(lambda *_: asyncio.sleep(0))
    made = receipt(answers=4, prompt_len=100)
    monkeypatch.setenv("VLLM_ENABLE_RESPONSES_API_STORE", "0")
    stored._store("0", [made])
    assert not stored._stored
    monkeypatch.setenv("VLLM_ENABLE_RESPONSES_API_STORE", "1")
    monkeypatch.setattr(middleware, "_STORED_SCORES", 3 * made.num_scores)
    for number in range(5):
        stored._store(str(number), [made])
    assert list(stored._stored) == [f"/v1/responses/{number}" for number in (2, 3, 4)]


def test_scrapes_at_once_ask_the_workers_once() -> None:
    """Anybody may scrape, and every question waits for a step and takes time from the next."""
    asked = 0

    async def collective_rpc(method: str) -> list[tuple[int, float, int]]:
        nonlocal asked
        asked += 1
        await asyncio.sleep(0.01)
        return [(1, 0.5, 0)]

    async def run() -> None:
        middleware = SteeringMiddleware(lambda *_: asyncio.sleep(0))
        engine = SimpleNamespace(collective_rpc=collective_rpc)
        for count in (1, 2):
            first, *others = [asyncio.ensure_future(middleware._measure(engine)) for _ in range(20)]
            await asyncio.sleep(0)
            # Who hangs up takes nothing from the others.
            first.cancel()
            await asyncio.gather(*others)
            assert asked == count

    asyncio.run(run())
