"""Steering inside a message of a body, which vLLM drops without a word."""

from __future__ import annotations

import re
from typing import Any

from vllm_steer.errors import RequestError
from vllm_steer.request.schema import REQUEST_KEY
from vllm_steer.serving.asgi import Message, Send, key_digest, parse_object, route_of, send_error
from vllm_steer.serving.refusals import count_refusal

# What holds messages and options of vLLM's own. Elsewhere a client may say what it likes: schemas of tools and
# answers, arguments of tools, metadata, documents.
_PLACES = ("messages", "input", "stream_options")
_CONTENT = "content"
_DEPTH = 4
# In another encoding than UTF-8 it looks otherwise.
_ASKS = re.compile(rb'"steer|\x00')


async def refused(body: bytes, scope: Message, send: Send) -> bool:
    """Answers 400 where a body has steering inside a message, and says whether it did.

    Args:
        body: The body as it came.
        scope: Of the HTTP request.
        send: Where the answer goes.
    """
    place = misplaced(body)
    if place is None:
        return False
    error = RequestError(
        f"{place}: steering is of the whole request and would be ignored here; send it as {REQUEST_KEY!r} beside 'model'"
    )
    count_refusal(error, route_of(scope), key_digest(scope))
    await send_error(send, str(error), place)
    return True


def misplaced(body: bytes) -> str | None:
    """Returns where steering stands inside a message or a part of its content; None where it does not."""
    if _ASKS.search(body) is None:
        return None
    fields = parse_object(body) or {}
    found = (_inside(fields.get(place), place, _DEPTH) for place in _PLACES)
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
