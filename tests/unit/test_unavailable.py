"""Who waited too long gets 503, whatever was about to be sent before the first token."""

from __future__ import annotations

import asyncio
from typing import Any

from vllm_steer.plan.steering_plan import SteeringPlan
from vllm_steer.serving.http_context import HttpContext
from vllm_steer.serving.receipt import LimitedPlan, Receipt
from vllm_steer.serving.responses import Unavailable

START = {"type": "http.response.start", "status": 200, "headers": []}


def event(name: str, more: bool = True) -> dict[str, Any]:
    return {"type": "http.response.body", "body": name.encode(), "more_body": more}


def sent(*steps: Any) -> list[Any]:
    """Status and bodies that a client gets; a step is a message, or what happens to the HTTP context."""
    got: list[Any] = []

    async def send(message: Any) -> None:
        got.append(message.get("status", message.get("body")))

    async def run() -> None:
        receipt = Receipt.of(LimitedPlan(SteeringPlan(()), 0.0), {}, 4)
        http_context = HttpContext("/v1/responses", receipts=[receipt])
        unavailable = Unavailable(send, http_context)
        for step in steps:
            if isinstance(step, dict):
                await unavailable.send(step)
            else:
                step(http_context)
        await unavailable.refuse()

    asyncio.run(run())
    return got


def let_in(http_context: HttpContext) -> None:
    http_context.let_in = True


def time_out(http_context: HttpContext) -> None:
    http_context.busy = "no row"


def test_events_that_say_that_it_began_are_not_sent_before_it_is_let_in() -> None:
    begun = (START, event("created"), event("in progress"))
    assert sent(*begun) == []
    assert sent(*begun, let_in, event("token")) == [200, b"created", b"in progress", b"token"]
    # vLLM raises, or says it in an event.
    assert sent(*begun, time_out)[0] == 503
    refused = sent(*begun, time_out, event("error"), event("", more=False))
    assert (refused[0], len(refused)) == (503, 2)


def test_what_has_begun_is_not_taken_back() -> None:
    begun = (START, let_in, event("token"))
    assert sent(*begun, time_out, event("error", more=False)) == [200, b"token", b"error"]


def test_whole_answers_pass() -> None:
    assert sent(START, event("refused", more=False)) == [200, b"refused"]
    assert sent(START, time_out, event("refused", more=False))[0] == 503
