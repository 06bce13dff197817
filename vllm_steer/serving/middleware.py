"""Middleware of the steered routes: aliases and receipts. It also serves the plugin's own routes.

A request for the model ``SERVED:ALIAS`` becomes one for ``SERVED`` with the alias's steering, for clients
that can only choose a model. Responses to steered requests get ``steering``, a list with a receipt for each
prompt, and the header ``x-steering``; in a stream, the chunk that ends an answer has it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import TYPE_CHECKING

from vllm import envs
from vllm.v1.engine.exceptions import EngineDeadError

from vllm_steer.serving import metrics, misplaced, playground
from vllm_steer.serving.admission import Admission, current_admission
from vllm_steer.serving.aliases import named_alias
from vllm_steer.serving.asgi import (
    STEERED_ROUTES,
    App,
    Message,
    Receive,
    Send,
    exists,
    key_digest,
    model_of,
    read_body,
    replay,
    route_of,
    with_length,
    with_model,
)
from vllm_steer.serving.http_context import HttpContext
from vllm_steer.serving.packs_api import PREFIX, answer
from vllm_steer.serving.receipt import Receipt
from vllm_steer.serving.responses import ModelList, Receipts, Stored, Unavailable
from vllm_steer.vllm_compat.rpc import TIMES

if TYPE_CHECKING:
    from vllm.engine.protocol import EngineClient
    from vllm.entrypoints.openai.models.serving import OpenAIServingModels

# How long a scrape waits for the workers.
_SCRAPE_SECONDS = 2.0
_RESPONSES = "/v1/responses"
# Number of stored answers whose receipts are kept.
_STORED = 1024
# Of all of them together; 64 MiB.
_STORED_SCORES = 2**24


class SteeringMiddleware:
    """ASGI middleware; other routes, and servers without steering, are not affected."""

    def __init__(self, app: App) -> None:
        self.app = app
        # By the path of a stored answer.
        self._stored: dict[str, list[Receipt]] = {}
        self._measuring: asyncio.Future[None] | None = None

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Prepares a request on a steered route and completes its response."""
        admission = current_admission()
        if scope["type"] == "websocket" and admission is not None:
            # What it generates is read as the policy says for its key.
            with admission.answering(HttpContext(route_of(scope), key_digest(scope))):
                await self.app(scope, receive, send)
            return
        if scope["type"] != "http" or admission is None or admission.config is None:
            await self.app(scope, receive, send)
            return
        route = (scope["method"], route_of(scope))
        if route[1].startswith(PREFIX) and admission.store is not None:
            await answer(admission, admission.store, route[1], scope, receive, send)
        elif admission.config.playground and playground.serves(route[1]):
            await playground.answer(scope, send)
        elif route == ("GET", "/metrics"):
            await self._measure(scope["app"].state.engine_client)
            await self.app(scope, receive, send)
        elif route == ("GET", "/v1/models") and admission.policy.aliases:
            await self.app(scope, receive, ModelList(send, admission, key_digest(scope)).send)
        elif route[0] == "GET" and (receipts := self._stored.get(route[1])) is not None:
            await self.app(scope, receive, Stored(send, receipts).send)
        elif route[0] == "POST" and (route[1] in STEERED_ROUTES or exists(scope)):
            await self._steered(scope, receive, send, admission)
        else:
            await self.app(scope, receive, send)

    async def _steered(
        self, scope: Message, receive: Receive, send: Send, admission: Admission
    ) -> None:
        http_context = HttpContext(route_of(scope), key_digest(scope))
        body, messages = await read_body(receive)
        if await misplaced.refused(body, scope, send):
            return
        if admission.policy.aliases:
            name = model_of(body) if _may_name(body, admission.policy.aliases) else None
            if name is not None:
                named = named_alias(admission.policy, name)
                if named is not None and not _serves(scope, name):
                    http_context.model, http_context.alias = name, named.steering
                    body = with_model(body, named.served)
                    messages = [{"type": "http.request", "body": body}]
                    scope = {**scope, "headers": with_length(scope["headers"], len(body))}
        receive = replay(messages, receive)
        receipts = Receipts(send, http_context)
        await self._answered(http_context, scope, receive, receipts.send, admission)
        if receipts.answer_id is not None and http_context.route == _RESPONSES:
            self._store(receipts.answer_id, http_context.receipts)

    async def _measure(self, engine: EngineClient) -> None:
        """Asks the workers for their times; those who ask meanwhile share the answer, for each takes time from a step."""
        if self._measuring is None or self._measuring.done():
            self._measuring = asyncio.ensure_future(_measure_planning(engine))
        await asyncio.shield(self._measuring)

    def _store(self, answer_id: str, receipts: list[Receipt]) -> None:
        """Keeps the receipts of an answer that vLLM keeps, as long as there is room."""
        if not envs.VLLM_ENABLE_RESPONSES_API_STORE:
            return
        self._stored[f"{_RESPONSES}/{answer_id}"] = receipts
        scores = sum(receipt.num_scores for each in self._stored.values() for receipt in each)
        while len(self._stored) > _STORED or scores > _STORED_SCORES:
            dropped = self._stored.pop(next(iter(self._stored)))
            scores -= sum(receipt.num_scores for receipt in dropped)

    async def _answered(
        self,
        http_context: HttpContext,
        scope: Message,
        receive: Receive,
        send: Send,
        admission: Admission,
    ) -> None:
        """Lets vLLM answer the request, or answers 503 if its wait timed out."""
        unavailable = Unavailable(send, http_context)
        with admission.answering(http_context):
            try:
                await self.app(scope, receive, unavailable.send)
            # vLLM does not catch it everywhere while streaming.
            except Exception:
                if not await unavailable.refuse():
                    raise


def _may_name(body: bytes, aliases: Iterable[str]) -> bool:
    """Whether a body may name an alias, so that most bodies need not be parsed."""
    # Escaped, or in another encoding than UTF-8, it may look different.
    return b"\\u" in body or b"\0" in body or any(f":{alias}".encode() in body for alias in aliases)


async def _measure_planning(engine: EngineClient) -> None:
    """Gets the workers' planning time since the last scrape."""
    try:
        times = await asyncio.wait_for(engine.collective_rpc(TIMES), _SCRAPE_SECONDS)
    except (TimeoutError, EngineDeadError):
        # In a long step, or dead, as other metrics show; the gauge keeps its last value.
        return
    steps, seconds, cut = (sum(values) for values in zip(*times, strict=True))
    metrics.ROWS_CUT.inc(cut)
    if steps:
        metrics.PLANNING.set(seconds / steps)


def _serves(scope: Message, name: str) -> bool:
    """Whether a model is served under exactly this name."""
    models: OpenAIServingModels | None = getattr(scope["app"].state, "openai_serving_models", None)
    return models is not None and models.is_base_model(name)
