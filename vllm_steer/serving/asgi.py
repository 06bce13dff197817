"""ASGI helpers of the middleware: reading and replaying bodies, and JSON responses."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Awaitable, Callable, Iterable, MutableMapping, Sequence
from http import HTTPStatus
from typing import Any

import msgspec
from pydantic_core import from_json, to_json

from vllm_steer.errors import shortened

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]


class _Fields(msgspec.Struct):
    """The fields of a body that are looked at before vLLM parses it; others are passed over."""

    model: Any = None
    messages: Any = None
    input: Any = None
    stream_options: Any = None


_FIELDS = msgspec.json.Decoder(_Fields)
# Lone surrogates are not valid text, and stricter parsers than vLLM's refuse them.
_SURROGATES = re.compile(rb"\\u[dD][89a-fA-F][0-9a-fA-F]{2}")
STEERED_ROUTES = ("/v1/chat/completions", "/v1/completions", "/v1/responses")


def route_of(scope: Message) -> str:
    """Path of a request as the application sees it, without a proxy's prefix and without a trailing slash."""
    path: str = scope["path"]
    root: str = scope.get("root_path") or ""
    # Of a prefix that ends within a name, nothing is taken away.
    within = path.startswith(root) and path[len(root) :][:1] in ("", "/")
    return (path.removeprefix(root) if within else path).rstrip("/")


def routes_of(scope: Message) -> list[Any]:
    """Returns the application's routes for a request's path and method."""
    found = []
    for route in scope["app"].routes:
        match, _ = route.matches(scope)
        if match.name == "FULL" and hasattr(route, "endpoint"):
            found.append(route)
    return found


def exists(scope: Message) -> bool:
    """Whether there is a route for a request; without one, its body is not read."""
    return bool(routes_of(scope))


def key_digest(scope: Message) -> str | None:
    """SHA-256 of the key in ``Authorization: Bearer KEY``, in hexadecimal; None without one.

    Of several such headers the first counts, as in vLLM. What is not UTF-8 is read as vLLM reads it, which
    knows a key in Latin-1 for the same text.
    """
    headers: Iterable[tuple[bytes, bytes]] = scope["headers"]
    value = next((value for name, value in headers if name == b"authorization"), b"")
    scheme, _, key = value.partition(b" ")
    try:
        key.decode()
    except UnicodeDecodeError:
        key = key.decode("latin-1").encode()
    return hashlib.sha256(key).hexdigest() if scheme.lower() == b"bearer" and key else None


async def read_body(receive: Receive) -> tuple[bytes, list[Message]]:
    """Returns a request's body and its messages."""
    messages = [await receive()]
    while messages[-1]["type"] == "http.request" and messages[-1].get("more_body"):
        messages.append(await receive())
    return b"".join(message.get("body", b"") for message in messages), messages


async def read_limited(receive: Receive, limit: int) -> bytes | None:
    """Returns a request's body; None, without storing it, if it is longer than ``limit`` bytes or ends
    early."""
    parts, size, more = [], 0, True
    while more and size <= limit:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        part = message.get("body", b"")
        size += len(part)
        parts.append(part)
        more = bool(message.get("more_body"))
    return b"".join(parts) if size <= limit else None


def replay(messages: list[Message], receive: Receive) -> Receive:
    """Returns a ``receive`` that repeats messages before the ones not yet received."""
    again = iter(messages)

    async def receive_again() -> Message:
        message = next(again, None)
        return await receive() if message is None else message

    return receive_again


def parse_object(body: bytes) -> dict[str, Any] | None:
    """Parses a JSON object; None for any other body, which is left to its route."""
    try:
        # Keys and texts of a body are seldom the same.
        fields = from_json(body, cache_strings=False)
    except ValueError:
        # Stricter about text, such as lone surrogates, than vLLM's parser.
        try:
            fields = json.loads(body)
        except (ValueError, RecursionError):
            return None
    return fields if isinstance(fields, dict) else None


def dump_object(fields: dict[str, Any]) -> bytes:
    """Serialises a JSON object from :func:`parse_object`."""
    try:
        return to_json(fields, inf_nan_mode="constants")
    except ValueError:
        return json.dumps(fields).encode()


def fields_of(body: bytes) -> _Fields:
    """Returns some fields of a JSON object without parsing others, however many there are; None for those it lacks."""
    try:
        return _FIELDS.decode(body)
    except (msgspec.MsgspecError, RecursionError):
        try:
            return _FIELDS.decode(_SURROGATES.sub(b"?", body))
        except (msgspec.MsgspecError, RecursionError):
            found = parse_object(body) or {}
            return _Fields(**{name: found.get(name) for name in _Fields.__struct_fields__})


def model_of(body: bytes) -> str | None:
    """Returns ``model`` of a JSON object; None if it has none."""
    model = fields_of(body).model
    return model if isinstance(model, str) else None


def with_model(body: bytes, model: str) -> bytes:
    """Returns the body of a JSON object with its ``model`` replaced."""
    if json.detect_encoding(body) != "utf-8":
        return dump_object((parse_object(body) or {}) | {"model": model})
    # Of duplicate keys the last counts.
    return body.rstrip()[:-1] + b',"model":' + json.dumps(model).encode() + b"}"


def with_length(headers: list[tuple[bytes, bytes]], length: int) -> list[tuple[bytes, bytes]]:
    """Returns headers with another content length."""
    kept = [(name, value) for name, value in headers if name.lower() != b"content-length"]
    return [*kept, (b"content-length", str(length).encode())]


async def send_json(
    send: Send, status: int, content: Any, more: Sequence[tuple[bytes, bytes]] = ()
) -> None:
    """Sends a complete JSON response; ``more`` has additional headers."""
    body = json.dumps(content).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers += more
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def send_error(
    send: Send,
    message: str,
    field: str,
    status: int = 400,
    more: Sequence[tuple[bytes, bytes]] = (),
) -> None:
    """Sends an error in the OpenAI API's format."""
    kind = HTTPStatus(status).phrase.title().replace(" ", "") + "Error"
    error = {"message": shortened(message), "type": kind, "param": shortened(field), "code": status}
    await send_json(send, status, {"error": error}, more)
