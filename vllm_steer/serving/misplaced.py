"""Steering inside a message of a body, in a header or in the query, which vLLM ignores silently."""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import parse_qsl

from vllm_steer.errors import RequestError
from vllm_steer.request.schema import REQUEST_KEY, is_steering_key
from vllm_steer.serving.asgi import Message, Send, fields_of, key_digest, route_of, send_error
from vllm_steer.serving.refusals import count_refusal

# Fields with vLLM's messages and options. Other fields may hold anything: schemas and arguments of tools,
# response formats, metadata, documents.
_PLACES = ("messages", "input", "stream_options")
_CONTENT = "content"
_DEPTH = 4
_IN_QUERY = re.compile(r"steer|%", re.IGNORECASE)


async def refused(body: bytes, scope: Message, send: Send) -> bool:
    """Answers 400 if a request has steering outside its body or inside a message, and returns whether it did.

    Args:
        body: The raw body.
        scope: Scope of the HTTP request.
        send: The ASGI ``send``.
    """
    place = beside(scope) or misplaced(body)
    if place is None:
        return False
    error = RequestError(
        f"{place}: steering applies to the whole request and is ignored here; send it as {REQUEST_KEY!r} beside 'model'"
    )
    count_refusal(error, route_of(scope), key_digest(scope))
    await send_error(send, str(error), place)
    return True


def beside(scope: Message) -> str | None:
    """Returns the header or query parameter that was meant for steering; None if there is none."""
    query: str = scope["query_string"].decode("latin-1")
    # Of a query without any of them, however long, nothing is taken apart.
    parameters = parse_qsl(query, True) if _IN_QUERY.search(query) else []
    named = [("header", name.decode("latin-1")) for name, _ in scope["headers"]]
    named += [("query", name) for name, _ in parameters]
    return next((f"{kind} {name}" for kind, name in named if is_steering_key(name)), None)


def misplaced(body: bytes) -> str | None:
    """Returns the path of steering inside a message or a part of its content; None if there is none."""
    # In another encoding than UTF-8 it looks different.
    if b'"steer' not in body and b"\0" not in body:
        return None
    fields = fields_of(body)
    found = (_inside(getattr(fields, place), place, _DEPTH) for place in _PLACES)
    return next((place for place in found if place is not None), None)


def _inside(value: Any, place: str, depth: int) -> str | None:
    if isinstance(value, list) and depth:
        inside = (_inside(each, f"{place}[{at}]", depth - 1) for at, each in enumerate(value))
        return next((found for found in inside if found is not None), None)
    if not isinstance(value, dict):
        return None
    key = next((key for key in value if key.startswith("steer")), None)
    if key is not None:
        return f"{place}.{key}"
    return _inside(value.get(_CONTENT), f"{place}.{_CONTENT}", depth - 1) if depth else None
