"""Detects when the engine is done with a request, whether or not a client still reads its answer.

A stream may end for its reader long after it ended in the engine. vLLM's output processor knows when each
request is added, finished or aborted; a steered prompt is one such request for each of its answers.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.v1.engine import EngineCoreRequest
    from vllm.v1.engine.output_processor import OutputProcessor, RequestState

from vllm_steer.plan.message import plan_of
from vllm_steer.serving.scores import expect_scores

# vLLM sends an abort right after noting it, and it must reach the engine before the next request.
_AFTER_ABORT_SECONDS = 0.01


@dataclass(eq=False)
class EnginePrompt:
    """One steered prompt in the engine.

    Attributes:
        answers: Number of its engine requests.
        done: Called when all of them are done.
        running: Ids of those in the engine.
        ended: Number of those that are done.
    """

    answers: int
    done: Callable[[], None]
    running: set[str] = field(default_factory=set)
    ended: int = 0


# Set while vLLM adds a steered prompt.
arriving: ContextVar[EnginePrompt | None] = ContextVar("arriving", default=None)
_running: dict[str, EnginePrompt] = {}


def note_arrival(original: Callable[..., None]) -> Callable[..., None]:
    """Wraps ``OutputProcessor.add_request``."""

    def add_request(
        self: OutputProcessor, request: EngineCoreRequest, *args: object, **kwargs: object
    ) -> None:
        # A plan that cannot be read must leave nothing here, since the engine will not hear of the request.
        plan = plan_of(request.sampling_params)
        original(self, request, *args, **kwargs)
        if plan is not None and plan.reads:
            expect_scores(self.request_states[request.request_id], plan)
        prompt = arriving.get()
        if prompt is not None:
            prompt.running.add(request.request_id)
            _running[request.request_id] = prompt

    return add_request


def note_finish(original: Callable[..., None]) -> Callable[..., None]:
    """Wraps ``OutputProcessor._finish_request``."""

    def _finish_request(self: OutputProcessor, req_state: RequestState) -> None:
        original(self, req_state)
        _end(req_state.request_id)

    return _finish_request


def note_abort(original: Callable[..., list[str]]) -> Callable[..., list[str]]:
    """Wraps ``OutputProcessor.abort_requests``, which returns the ids of the aborted requests."""

    def abort_requests(self: OutputProcessor, *args: object, **kwargs: object) -> list[str]:
        aborted = original(self, *args, **kwargs)
        for request_id in aborted:
            _end(request_id)
        return aborted

    return abort_requests


def forget(prompt: EnginePrompt) -> None:
    """Ends a prompt whose answers are no longer awaited."""
    for request_id in prompt.running:
        _running.pop(request_id, None)


def _end(request_id: str) -> None:
    prompt = _running.pop(request_id, None)
    if prompt is None:
        return
    prompt.running.discard(request_id)
    prompt.ended += 1
    if prompt.ended == prompt.answers:
        asyncio.get_running_loop().call_later(_AFTER_ABORT_SECONDS, prompt.done)
