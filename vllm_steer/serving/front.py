"""In front of the steered routes: model names that stand for a steering, and receipts.

A request for the model ``SERVED:ALIAS`` becomes one for ``SERVED`` with the alias's steering, for
clients that can send nothing else. Responses to steered requests get ``steering``, a list with a
receipt for each prompt, and the header ``x-steering``; in a stream, the chunk that ends an answer
has it.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterable
from typing import Any

from vllm.v1.engine.exceptions import EngineDeadError

from vllm_steer.receipt import HEADER
from vllm_steer.request import REQUEST_KEY
from vllm_steer.rpc import TIMES
from vllm_steer.serving import metrics
from vllm_steer.serving.admission import Admission, current_admission
from vllm_steer.serving.asgi import (
    App,
    Message,
    Receive,
    Send,
    dump_object,
    exists,
    key_digest,
    parse_object,
    read_body,
    replay,
    route_of,
    send_error,
)
from vllm_steer.serving.exchange import Exchange, current_exchange
from vllm_steer.serving.packs_api import PREFIX, answer

_MESSAGE_END = "message_stop"
_END = re.compile(
    rb'"finish_reason":\s*"|"type":\s*"(response\.(completed|incomplete)|message_stop)"'
)
# How long a scrape waits for the workers.
_SCRAPE_SECONDS = 2.0
# When a client that was not let in should come again.
_RETRY_SECONDS = 5


class SteeringFront:
    """ASGI middleware; other routes, and servers without steering, pass untouched."""

    def __init__(self, app: App) -> None:
        self.app = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Prepares a request on a steered route and completes its response."""
        admission = current_admission()
        if scope["type"] != "http" or admission is None or admission.config is None:
            await self.app(scope, receive, send)
            return
        route = (scope["method"], route_of(scope))
        if route[1].startswith(PREFIX) and admission.store is not None:
            await answer(admission, admission.store, route[1], scope, receive, send)
        elif route == ("GET", "/metrics"):
            await _measure_planning(scope["app"].state.engine_client)
            await self.app(scope, receive, send)
        elif route == ("GET", "/v1/models") and admission.policy.aliases:
            await self.app(scope, receive, _ModelList(send, admission, key_digest(scope)).send)
        elif route[0] == "POST" and exists(scope):
            await self._steered(scope, receive, send, admission)
        else:
            await self.app(scope, receive, send)

    async def _steered(
        self, scope: Message, receive: Receive, send: Send, admission: Admission
    ) -> None:
        exchange = Exchange(route_of(scope), key_digest(scope))
        if admission.policy.aliases:
            body, messages = await read_body(receive)
            fields = parse_object(body) if _may_name(body, admission.policy.aliases) else None
            name = fields.get("model") if fields else None
            if fields is not None and isinstance(name, str):
                served, _, alias = name.rpartition(":")
                if served and alias in admission.policy.aliases and not _serves(scope, name):
                    exchange.model = name
                    exchange.alias = admission.policy.aliases[alias]
                    body = dump_object(fields | {"model": served})
                    messages = [{"type": "http.request", "body": body}]
                    scope = {**scope, "headers": _with_length(scope["headers"], len(body))}
            receive = replay(messages, receive)
        await self._exchanged(exchange, scope, receive, _Receipts(send, exchange).send, admission)

    async def _exchanged(
        self, exchange: Exchange, scope: Message, receive: Receive, send: Send, admission: Admission
    ) -> None:
        """Lets vLLM answer with an exchange, and counts out what it was admitted with."""
        token = current_exchange.set(exchange)
        try:
            await self.app(scope, receive, _Unavailable(send, exchange).send)
        finally:
            current_exchange.reset(token)
            for receipt in exchange.receipts:
                admission.release(receipt)


class _Unavailable:
    """Answers with 503 what waited too long, also where vLLM has begun to answer with 200."""

    def __init__(self, send: Send, exchange: Exchange) -> None:
        self._send, self._exchange = send, exchange
        self._start: Message | None = None
        self._refused = False

    async def send(self, message: Message) -> None:
        """Takes the place of ``send``."""
        if self._refused:
            return
        if message["type"] == "http.response.start" and self._exchange.receipts:
            # Until there is something of the body it is not known whether all prompts were let in.
            self._start = message
            return
        start, self._start = self._start, None
        if start is not None and self._exchange.busy is not None:
            self._refused = True
            retry = [(b"retry-after", str(_RETRY_SECONDS).encode())]
            await send_error(self._send, self._exchange.busy, REQUEST_KEY, 503, retry)
            return
        if start is not None:
            await self._send(start)
        await self._send(message)


class _Buffered:
    """Holds a JSON response back until it is whole."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._start: Message | None = None
        self._body = b""

    async def _pass_whole(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._start = message
            return
        self._body += message.get("body", b"")
        if message.get("more_body") or self._start is None:
            return
        body, start = self._complete(self._body), self._start
        start["headers"] = _with_length(start["headers"], len(body))
        await self._send(start)
        await self._send({"type": "http.response.body", "body": body})

    def _complete(self, body: bytes) -> bytes:
        raise NotImplementedError


class _ModelList(_Buffered):
    """Adds the aliases that a key may use to the list of models."""

    def __init__(self, send: Send, admission: Admission, key: str | None) -> None:
        super().__init__(send)
        assert admission.store is not None
        self._aliases = admission.policy.shown_aliases(key, admission.store.registry)

    async def send(self, message: Message) -> None:
        """Takes the place of ``send``."""
        await self._pass_whole(message)

    def _complete(self, body: bytes) -> bytes:
        models = parse_object(body)
        if models is None or not isinstance(models.get("data"), list):
            return body
        served = [card for card in models["data"] if not card.get("parent")]
        models["data"] += [
            card | {"id": f"{card['id']}:{alias}", "parent": card["id"], "owned_by": "vllm-steer"}
            for card in served
            for alias in self._aliases
        ]
        return json.dumps(models).encode()


class _Receipts(_Buffered):
    """Puts the receipts of an exchange into its response."""

    def __init__(self, send: Send, exchange: Exchange) -> None:
        super().__init__(send)
        self._exchange = exchange
        self._kind: bytes | None = None

    async def send(self, message: Message) -> None:
        """Takes the place of ``send``."""
        if message["type"] == "http.response.start":
            self._kind = None
            if self._exchange.receipts and message["status"] == 200:
                headers = dict(message["headers"])
                self._kind = headers.get(b"content-type", b"").partition(b";")[0]
                summary = ", ".join(r.to_header() for r in self._exchange.receipts[:1])
                message["headers"] = [
                    *message["headers"],
                    (HEADER.encode(), summary.encode("latin-1", "replace")),
                ]
        if self._kind == b"application/json":
            await self._pass_whole(message)
        elif self._kind == b"text/event-stream" and message["type"] == "http.response.body":
            await self._pass_events(message)
        else:
            await self._send(message)

    async def _pass_events(self, message: Message) -> None:
        *events, rest = (self._body + message.get("body", b"")).split(b"\n\n")
        if not message.get("more_body"):
            events, rest = [*events, rest], b""
        self._body = rest
        stamped = [self._stamp(event) if _END.search(event) else event for event in events]
        end = b"\n\n" if message.get("more_body") else b""
        await self._send({**message, "body": b"\n\n".join(stamped) + (end if stamped else b"")})

    def _stamp(self, event: bytes) -> bytes:
        before, marker, data = event.partition(b"data: ")
        chunk = parse_object(data)
        if chunk is None:
            return event
        if chunk.get("type") == _MESSAGE_END:
            chunk[REQUEST_KEY] = [r.to_json() for r in self._exchange.receipts]
        elif isinstance(chunk.get("response"), dict):
            chunk["response"][REQUEST_KEY] = [r.to_json() for r in self._exchange.receipts]
        else:
            ended = [c["index"] for c in chunk.get("choices", ()) if c.get("finish_reason")]
            found = [self._exchange.receipt_of(index) for index in ended]
            chunk[REQUEST_KEY] = [pair[0].to_json(pair[1]) for pair in found if pair is not None]
        return before + marker + json.dumps(chunk).encode()

    def _complete(self, body: bytes) -> bytes:
        fields = parse_object(body)
        if fields is None:
            return body
        fields[REQUEST_KEY] = [receipt.to_json() for receipt in self._exchange.receipts]
        return json.dumps(fields, ensure_ascii=False).encode()


def _may_name(body: bytes, aliases: Iterable[str]) -> bool:
    """Whether a body can name an alias at all, which saves most of them from being parsed twice."""
    return b"\\u" in body or any(f":{alias}".encode() in body for alias in aliases)


async def _measure_planning(engine: Any) -> None:
    """Asks the workers how long planning took since the last scrape."""
    try:
        times = await asyncio.wait_for(engine.collective_rpc(TIMES), _SCRAPE_SECONDS)
    except (TimeoutError, EngineDeadError):
        # In a long step, or gone, which other metrics tell; the gauge keeps its last value.
        return
    steps, seconds = (sum(values) for values in zip(*times, strict=True))
    if steps:
        metrics.PLANNING.set(seconds / steps)


def _serves(scope: Message, name: str) -> bool:
    """Whether a model is served under the very name."""
    models: Any = getattr(scope["app"].state, "openai_serving_models", None)
    return bool(models is not None and models.is_base_model(name))


def _with_length(headers: list[tuple[bytes, bytes]], length: int) -> list[tuple[bytes, bytes]]:
    kept = [(name, value) for name, value in headers if name.lower() != b"content-length"]
    return [*kept, (b"content-length", str(length).encode())]
