"""Changes to responses: receipts, aliases in the model list, and 503 for requests that waited too long."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import msgspec

from vllm_steer.request.schema import REQUEST_KEY
from vllm_steer.serving.admission import Admission
from vllm_steer.serving.asgi import (
    Message,
    Send,
    dump_object,
    parse_object,
    send_error,
    with_length,
)
from vllm_steer.serving.http_context import HttpContext
from vllm_steer.serving.receipt import HEADER, SCORES_KEY, Receipt, shown_scores

_JSON = b"application/json"
_MESSAGE_END = "message_stop"
_END = re.compile(
    rb'"finish_reason":\s*"|"type":\s*"(response\.(completed|incomplete)|message_stop)"'
)
_RECEIPTS_FIELD = b'"%s":[%%b]' % REQUEST_KEY.encode()
# Objects of the chunks that carry scores.
_CHOICES = b'"choices"'
# Parts of a receipt that may be long.
_SCORES = ("prompt", "generated")
# More than these are written in another thread, so that the server answers others meanwhile.
_MANY_SCORES = 2**14
# When a refused client should retry.
_RETRY_SECONDS = 5

R = TypeVar("R")


class Unavailable:
    """Answers a request that waited too long with 503, even if vLLM has begun to answer with 200."""

    def __init__(self, send: Send, http_context: HttpContext) -> None:
        self._send, self._http_context = send, http_context
        # vLLM's messages before its first token: the start, and events that announce it.
        self._kept: list[Message] = []
        self._refused = False

    async def send(self, message: Message) -> None:
        """Replaces ``send``."""
        if self._refused:
            return
        if message["type"] == "http.response.start" and self._http_context.receipts:
            self._kept = [message]
            return
        if await self.refuse():
            return
        if self._kept and not self._http_context.let_in and message.get("more_body"):
            self._kept.append(message)
            return
        kept, self._kept = self._kept, []
        for each in (*kept, message):
            await self._send(each)

    async def refuse(self) -> bool:
        """Answers with 503 if a wait timed out before anything was sent; returns whether it did."""
        if self._kept and self._http_context.busy is not None:
            self._kept, self._refused = [], True
            retry = [(b"retry-after", str(_RETRY_SECONDS).encode())]
            await send_error(self._send, self._http_context.busy, REQUEST_KEY, 503, retry)
        return self._refused


class _Buffered:
    """Buffers a JSON response until it is complete."""

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
        body, start = await self._whole(), self._start
        start["headers"] = with_length(start["headers"], len(body))
        await self._send(start)
        await self._send({"type": "http.response.body", "body": body})

    async def _whole(self) -> bytes:
        return self._complete(self._body)

    def _complete(self, body: bytes) -> bytes:
        raise NotImplementedError


class ModelList(_Buffered):
    """Adds the aliases that a key may use to the model list."""

    def __init__(self, send: Send, admission: Admission, key: str | None) -> None:
        super().__init__(send)
        assert admission.store is not None
        self._aliases = admission.policy.shown_aliases(key, admission.store.registry)

    async def send(self, message: Message) -> None:
        """Replaces ``send``."""
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


class Stored(_Buffered):
    """Adds receipts to a stored answer that is retrieved later."""

    def __init__(self, send: Send, receipts: list[Receipt]) -> None:
        super().__init__(send)
        self._receipts = receipts

    async def send(self, message: Message) -> None:
        """Replaces ``send``."""
        if message["type"] == "http.response.start" and _kind_of(message) != _JSON:
            # A stream of events that already have receipts.
            self._receipts = []
        if self._receipts:
            await self._pass_whole(message)
        else:
            await self._send(message)

    async def _whole(self) -> bytes:
        return await _written(self._receipts, self._complete, self._body)

    def _complete(self, body: bytes) -> bytes:
        return body if parse_object(body) is None else _with_receipts(body, self._receipts)


class Receipts(_Buffered):
    """Adds the receipts of an HTTP request to its response.

    Attributes:
        answer_id: ``id`` of the response, once it is known and has receipts.
    """

    def __init__(self, send: Send, http_context: HttpContext) -> None:
        super().__init__(send)
        self._http_context = http_context
        self._kind: bytes | None = None
        # Position of the next scores of each answer in a stream.
        self._sent: dict[int, int] = {}
        self.answer_id: str | None = None

    async def send(self, message: Message) -> None:
        """Replaces ``send``."""
        if message["type"] == "http.response.start":
            self._kind = None
            if self._http_context.shown_receipts and message["status"] == 200:
                self._kind = _kind_of(message)
                summary = ", ".join(r.to_header() for r in self._http_context.receipts[:1])
                message["headers"] = [
                    *message["headers"],
                    (HEADER.encode(), summary.encode("latin-1", "replace")),
                ]
        if self._kind == _JSON:
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
        reads = any(receipt.own_reads for receipt in self._http_context.receipts)
        stamped = []
        for event in events:
            if _END.search(event) or (reads and _CHOICES in event):
                event = await _written(self._http_context.receipts, self._stamp, event)
            stamped.append(event)
        end = b"\n\n" if message.get("more_body") else b""
        await self._send({**message, "body": b"\n\n".join(stamped) + (end if stamped else b"")})

    def _stamp(self, event: bytes) -> bytes:
        before, marker, data = event.partition(b"data: ")
        chunk = parse_object(data)
        if chunk is None:
            return event
        receipts = self._http_context.receipts
        if chunk.get("type") == _MESSAGE_END:
            return before + marker + _with_receipts(data, receipts)
        if isinstance(chunk.get("response"), dict):
            response = chunk.pop("response")
            self.answer_id = response.get("id")
            more = b'"response":' + _with_receipts(dump_object(response), receipts)
            return before + marker + _with_field(dump_object(chunk), more)
        choices = chunk.get("choices", ())
        ended = [c["index"] for c in choices if c.get("finish_reason")]
        found = [self._http_context.receipt_of(index) for index in ended]
        if ended:
            shown = [_dump_receipt(*pair) for pair in found if pair is not None]
            data = _with_field(data, _RECEIPTS_FIELD % b",".join(shown))
        if scores := self._new_scores([c["index"] for c in choices]):
            more = b'"%s":' % SCORES_KEY.encode() + msgspec.json.encode(scores)
            data = _with_field(data, more)
        return before + marker + data

    def _new_scores(self, indices: list[int]) -> list[dict[str, Any]]:
        """The scores of some answers since the previous chunks."""
        new = []
        for index in indices:
            found = self._http_context.receipt_of(index)
            if found is None or not found[0].own_reads:
                continue
            scores, start = found[0].scores.get(found[1]), self._sent.get(index, 0)
            if scores is None or scores.end <= start:
                continue
            # More may come while these are written.
            since = scores.since(start)
            self._sent[index] = start + since.shape[1]
            rows = [_dump_scores(row) for row in map(shown_scores, since[: found[0].own_reads])]
            new.append({"index": index, "start": start, "scores": rows})
        return new

    async def _whole(self) -> bytes:
        return await _written(self._http_context.receipts, self._complete, self._body)

    def _complete(self, body: bytes) -> bytes:
        fields = parse_object(body)
        if fields is None:
            return body
        self.answer_id = fields.get("id")
        return _with_receipts(body, self._http_context.receipts)


def _kind_of(start: Message) -> bytes:
    """Content type of a response."""
    kind: bytes = dict(start["headers"]).get(b"content-type", b"")
    return kind.partition(b";")[0]


async def _written(receipts: Sequence[Receipt], write: Callable[[bytes], R], data: bytes) -> R:
    """Returns ``write(data)``, in another thread where the receipts have many scores."""
    if sum(receipt.num_scores for receipt in receipts if receipt.own_reads) > _MANY_SCORES:
        return await asyncio.to_thread(write, data)
    return write(data)


def _with_receipts(body: bytes, receipts: Sequence[Receipt]) -> bytes:
    """Returns a JSON object, which has fields, with receipts."""
    return _with_field(body, _RECEIPTS_FIELD % b",".join(map(_dump_receipt, receipts)))


def _with_field(body: bytes, field: bytes) -> bytes:
    """Returns a JSON object, which has fields, with one more, given as it is written."""
    return body.rstrip()[:-1] + b"," + field + b"}"


def _dump_receipt(receipt: Receipt, choice: int | None = None) -> bytes:
    shown = receipt.to_json(choice)
    for answer in (answer for read in shown.get("reads", ()) for answer in read["answers"]):
        answer |= {part: _dump_scores(answer[part]) for part in _SCORES if part in answer}
    return msgspec.json.encode(shown)


def _dump_scores(scores: list[float | None]) -> msgspec.Raw:
    """Scores as they are written; a thread that writes them row by row leaves others their turn."""
    return msgspec.Raw(msgspec.json.encode(scores))
