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


class _Named(msgspec.Struct):
    model: Any = None


_NAMED = msgspec.json.Decoder(_Named)
# Half of a pair is no text, and a stricter reader than vLLM's stops at it.
_SURROGATES = re.compile(rb"\\u[dD][89a-fA-F][0-9a-fA-F]{2}")
STEERED_ROUTES = ("/v1/chat/completions", "/v1/completions", "/v1/responses")


def route_of(scope: Message) -> str:
    """Path of a request without the prefix of a proxy, as the application sees it, and without a slash at the end."""
    path: str = scope["path"]
    root: str = scope.get("root_path") or ""
    # Of a prefix that ends within a name, nothing is taken away.
    within = path.startswith(root) and path[len(root) :][:1] in ("", "/")
    return (path.removeprefix(root) if within else path).rstrip("/")


def routes_of(scope: Message) -> list[Any]:
    """Returns the routes of the application that answer a request's path and method."""
    found = []
    for route in scope["app"].routes:
        match, _ = route.matches(scope)
        if match.name == "FULL" and hasattr(route, "endpoint"):
            found.append(route)
    return found


def exists(scope: Message) -> bool:
    """Whether there is a route for a request; where there is none, nothing is spent on its body."""
    return bool(routes_of(scope))


def key_digest(scope: Message) -> str | None:
    """SHA-256 of the key in ``Authorization: Bearer KEY``, in hexadecimal; None without one.

    Of several such headers the first counts, as it does for vLLM. What is not UTF-8 is read as vLLM reads it, which
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
    """Returns a request's body, and the messages that it came in."""
    messages = [await receive()]
    while messages[-1]["type"] == "http.request" and messages[-1].get("more_body"):
        messages.append(await receive())
    return b"".join(message.get("body", b"") for message in messages), messages


async def read_limited(receive: Receive, limit: int) -> bytes | None:
    """Returns a request's body; None where it is longer than ``limit`` bytes, without keeping it, or ends too early."""
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
    """Returns a ``receive`` that gives messages again before those that are still to come."""
    again = iter(messages)

    async def receive_again() -> Message:
        message = next(again, None)
        return await receive() if message is None else message

    return receive_again


def parse_object(body: bytes) -> dict[str, Any] | None:
    """Returns a JSON object; None where the body is something else, which its route answers."""
    try:
        fields = from_json(body)
    except ValueError:
        # It is stricter in what text may hold, as of surrogates, than what vLLM reads bodies with.
        try:
            fields = json.loads(body)
        except (ValueError, RecursionError):
            return None
    return fields if isinstance(fields, dict) else None


def dump_object(fields: dict[str, Any]) -> bytes:
    """Returns a JSON object as :func:`parse_object` read it."""
    try:
        return to_json(fields, inf_nan_mode="constants")
    except ValueError:
        return json.dumps(fields).encode()


def model_of(body: bytes) -> str | None:
    """Returns ``model`` of a JSON object, and reads no other value; None where it has none."""
    model: Any = None
    try:
        model = _NAMED.decode(body).model
    except (msgspec.MsgspecError, RecursionError):
        try:
            model = _NAMED.decode(_SURROGATES.sub(b"?", body)).model
        except (msgspec.MsgspecError, RecursionError):
            model = (parse_object(body) or {}).get("model")
    return model if isinstance(model, str) else None


def with_model(body: bytes, model: str) -> bytes:
    """Returns the body of a JSON object that has a ``model`` with another one."""
    if json.detect_encoding(body) != "utf-8":
        return dump_object((parse_object(body) or {}) | {"model": model})
    # Of a key that is given twice the last counts.
    return body.rstrip()[:-1] + b',"model":' + json.dumps(model).encode() + b"}"


def with_length(headers: list[tuple[bytes, bytes]], length: int) -> list[tuple[bytes, bytes]]:
    """Returns headers with another length of the body."""
    kept = [(name, value) for name, value in headers if name.lower() != b"content-length"]
    return [*kept, (b"content-length", str(length).encode())]


async def send_json(
    send: Send, status: int, content: Any, more: Sequence[tuple[bytes, bytes]] = ()
) -> None:
    """Sends a whole JSON response; ``more`` has further headers."""
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
    """Sends an error in the form of the OpenAI API."""
    kind = HTTPStatus(status).phrase.title().replace(" ", "") + "Error"
    error = {"message": shortened(message), "type": kind, "param": shortened(field), "code": status}
    await send_json(send, status, {"error": error}, more)
