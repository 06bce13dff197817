"""Refuses steering on HTTP routes that would ignore it.

The OpenAI-style routes keep unknown fields of a request's body, so admission sees ``steering`` there. All
other routes drop unknown fields, some also ``vllm_xargs``, before any code of the plugin runs; a steering
request sent to one of them would be answered with unsteered text.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import islice
from typing import TYPE_CHECKING, TypeVar, get_type_hints
from urllib.parse import unquote_to_bytes

from vllm_steer.errors import UnsupportedError
from vllm_steer.request.schema import (
    MOST_MISSPELT,
    WRAPPERS,
    first_steering_key,
    steering_keys,
    wrapped_steering,
)
from vllm_steer.serving.asgi import (
    STEERED_ROUTES,
    App,
    Message,
    Receive,
    Send,
    exists,
    key_digest,
    parse_object,
    read_body,
    replay,
    route_of,
    routes_of,
    send_error,
)
from vllm_steer.serving.middleware import SteeringMiddleware
from vllm_steer.serving.refusals import count_refusal

if TYPE_CHECKING:
    from fastapi import FastAPI

R = TypeVar("R")
_XARGS = "vllm_xargs"
# A body without these has no steering keys, so most bodies need not be parsed. Searched one by one, since an expression
# of all of them takes ten times as long.
_MAY_ASK = (b"steer", b"vllm_xargs", b"extra_", b"_params", b"\\u", b"\0")
_MAY_BE_MISSPELT = re.compile(rb'"(\s*(?:[sStT_]|[^\x00-\x7f])[^"]{0,95})"\s*:')
# Of audio messages, almost none are parsed twice.
_SAYS_STEER = re.compile(rb"steer|\\u", re.IGNORECASE)
_PARAMS = "sampling_params"
# Names of form fields, as used for audio uploads.
_FORM_FIELDS = {
    b"multipart/form-data": re.compile(rb'form-data;[^\r\n]*?\bname="?([^"\r\n]+)', re.IGNORECASE),
    b"application/x-www-form-urlencoded": re.compile(rb"(?:^|&)([^=&]+)"),
}
# In a message of a web socket.
_SESSION = "session"
_POLICY_VIOLATION = 1008
# Characters of a field in the reason why it ends, which may have 123 bytes.
_REASON = 10


def add_guard(original: Callable[..., R]) -> Callable[..., R]:
    """Wraps ``register_vllm_serve_api_routers`` of the API server to install the guard.

    vLLM adds its own middleware later, so a request is authenticated before the guard reads it.
    """

    def register_vllm_serve_api_routers(app: FastAPI) -> R:
        app.add_middleware(SteeringGuard)
        app.add_middleware(SteeringMiddleware)
        return original(app)

    return register_vllm_serve_api_routers


class SteeringGuard:
    """ASGI middleware; steered routes, unknown routes and bodies that are not JSON pass unchanged."""

    def __init__(self, app: App) -> None:
        self.app = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answers 400 if a body outside the steered routes asks for steering; closes a web socket that
        does."""
        if scope["type"] == "websocket":
            await self.app(scope, _Listened(receive, send, scope).receive, send)
            return
        if (
            scope["type"] != "http"
            or scope["method"] != "POST"
            or route_of(scope) in STEERED_ROUTES
            or not exists(scope)
        ):
            await self.app(scope, receive, send)
            return
        body, messages = await read_body(receive)
        field = _dropped_field(body, scope)
        if field is not None:
            await _refuse(scope, send, field)
            return
        await self.app(scope, replay(messages, receive), send)


class _Listened:
    """The messages of a web socket, up to the first one that asks for steering.

    vLLM's one route, for speech, reads a few fields of each message.
    """

    def __init__(self, receive: Receive, send: Send, scope: Message) -> None:
        self._receive, self._send, self._scope = receive, send, scope

    async def receive(self) -> Message:
        """Replaces ``receive``."""
        message = await self._receive()
        body = message.get("text") or message.get("bytes") or b""
        field = _asked_by_message(
            body.encode(errors="surrogatepass") if isinstance(body, str) else body
        )
        if field is None:
            return message
        error = _unsupported(self._scope, field)
        count_refusal(error, route_of(self._scope), key_digest(self._scope))
        reason = f"{field[:_REASON]!r}: this route does not support steering"
        await self._send({"type": "websocket.close", "code": _POLICY_VIOLATION, "reason": reason})
        return {"type": "websocket.disconnect", "code": _POLICY_VIOLATION}


def _asked_by_message(body: bytes) -> str | None:
    fields = parse_object(body) if _SAYS_STEER.search(body) else None
    if fields is None:
        return None
    session = fields.get(_SESSION)
    return first_steering_key(fields) or (
        first_steering_key(session) if isinstance(session, dict) else None
    )


def _dropped_field(body: bytes, scope: Message) -> str | None:
    """The first key of a body that asks for steering and that its route drops."""
    # Of several such headers the first counts.
    kinds = (value for name, value in scope["headers"] if name == b"content-type")
    kind = next(kinds, b"").partition(b";")[0].strip().lower()
    if kind in _FORM_FIELDS:
        names = map(unquote_to_bytes, _FORM_FIELDS[kind].findall(body))
        return first_steering_key(
            name.replace(b"+", b" ").decode(errors="replace") for name in names
        )
    fields = parse_object(body) if _may_ask(body) else None
    if fields is None:
        return None
    top = first_steering_key(fields)
    if top is not None:
        return top
    for field in WRAPPERS:
        if wrapped_steering(fields.get(field), text=True):
            return field
    if wrapped_steering(fields.get(_XARGS)) and not _takes(scope, _XARGS):
        return _XARGS
    params = fields.get(_PARAMS)
    if not wrapped_steering(params):
        return None
    # On token-in routes, only ``extra_args`` reach the engine.
    if isinstance(params, dict) and _takes(scope, _PARAMS):
        params = {key: value for key, value in params.items() if key != "extra_args"}
    return _PARAMS if wrapped_steering(params) else None


def _may_ask(body: bytes) -> bool:
    lower = body.lower()
    if any(word in lower for word in _MAY_ASK):
        return True
    keys = [*islice(_MAY_BE_MISSPELT.finditer(body), MOST_MISSPELT + 1)]
    # Of so many only the first of the body itself count, not those of objects in it.
    if len(keys) > MOST_MISSPELT:
        return True
    return bool(steering_keys(match[1].decode(errors="replace") for match in keys))


def _takes(scope: Message, field: str) -> bool:
    """Whether the route's request model has a field, which differs between versions of vLLM."""
    endpoints = [route.endpoint for route in routes_of(scope)]
    models = [kind for endpoint in endpoints for kind in get_type_hints(endpoint).values()]
    return any(field in getattr(model, "model_fields", ()) for model in models)


async def _refuse(scope: Message, send: Send, field: str) -> None:
    error = _unsupported(scope, field)
    count_refusal(error, route_of(scope), key_digest(scope))
    await send_error(send, str(error), field)


def _unsupported(scope: Message, field: str) -> UnsupportedError:
    return UnsupportedError(
        f"{route_of(scope)} does not support the field {field!r} and would ignore the steering; use "
        f"{', '.join(STEERED_ROUTES)}, or vllm_xargs where the route supports it"
    )
