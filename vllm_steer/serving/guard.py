"""Refuses steering on the HTTP routes that would drop it.

The OpenAI-style routes keep unknown fields of a request's body, so admission sees ``steering``
there. All other routes drop unknown fields before any of our code runs, some of them
``vllm_xargs`` too; a request for steering sent to one of them would be answered with unsteered
text.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar, get_type_hints

from vllm_steer.errors import UnsupportedError
from vllm_steer.request.schema import WRAPPERS, first_steering_key, wrapped_steering
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
# What a body must hold to have a key that asks for steering; most need not be parsed for it.
_MAY_ASK = re.compile(
    rb'"\s*(?:[sStT_]|[^\x00-\x7f])|(?i:steer)|vllm_xargs|extra_|_params|\\u|\x00'
)
_PARAMS = "sampling_params"


def add_guard(original: Callable[..., R]) -> Callable[..., R]:
    """Wraps ``register_vllm_serve_api_routers`` of the API server to put the guard in front.

    vLLM adds its own middleware later, so a request is authenticated before the guard reads it.
    """

    def register_vllm_serve_api_routers(app: FastAPI) -> R:
        app.add_middleware(SteeringGuard)
        app.add_middleware(SteeringMiddleware)
        return original(app)

    return register_vllm_serve_api_routers


class SteeringGuard:
    """ASGI middleware; the steered routes, those that do not exist and what is no JSON pass untouched."""

    def __init__(self, app: App) -> None:
        self.app = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answers 400 when a body outside the steered routes asks for steering."""
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


def _dropped_field(body: bytes, scope: Message) -> str | None:
    """The first key of a JSON body that asks for steering and that its route drops."""
    fields = parse_object(body) if _MAY_ASK.search(body) else None
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
    # Of what a token-in route takes, ``extra_args`` alone reach the engine.
    if isinstance(params, dict) and _takes(scope, _PARAMS):
        params = {key: value for key, value in params.items() if key != "extra_args"}
    return _PARAMS if wrapped_steering(params) else None


def _takes(scope: Message, field: str) -> bool:
    """Whether the route's request model has a field, which differs between versions of vLLM."""
    endpoints = [route.endpoint for route in routes_of(scope)]
    models = [kind for endpoint in endpoints for kind in get_type_hints(endpoint).values()]
    return any(field in getattr(model, "model_fields", ()) for model in models)


async def _refuse(scope: Message, send: Send, field: str) -> None:
    route = route_of(scope)
    error = UnsupportedError(
        f"{route} does not support the field {field!r} and would ignore the steering; use "
        f"{', '.join(STEERED_ROUTES)}, or vllm_xargs where the route supports it"
    )
    count_refusal(error, route, key_digest(scope))
    await send_error(send, str(error), field)
