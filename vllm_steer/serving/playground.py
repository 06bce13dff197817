"""The playground: a web page for trying directions, under ``/steering``.

It is a client of the server's API like any other. The page and its files are the same for everyone and hold nothing of
the server, so they need no API key; all that the page shows comes from routes that check the key of its user. Its files are
those of ``FILES``, read once; no path of a request becomes a path of a file. Importing this module imports neither
torch nor vllm.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Final

from vllm_steer.serving.asgi import Message, Send, route_of, send_error

PREFIX: Final = "/steering"
_HTML, _SCRIPT = "text/html; charset=utf-8", "text/javascript; charset=utf-8"
# By its name below the prefix: the page has none.
FILES: Final[dict[str, tuple[str, str]]] = {
    "": ("index.html", _HTML),
    "style.css": ("style.css", "text/css; charset=utf-8"),
    "icon.svg": ("icon.svg", "image/svg+xml"),
    **{
        name: (name, _SCRIPT)
        for name in (
            "main.js",
            "api.js",
            "dom.js",
            "directions.js",
            "reads.js",
            "request.js",
            "answers.js",
            "sweep.js",
        )
    },
}
# Nothing is run or loaded but the files above, no text becomes markup, and no other page may embed this one.
POLICY: Final = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
_HEADERS: Final = (
    (b"content-security-policy", POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
    # The files change with the version of the package: ask whether they did.
    (b"cache-control", b"no-cache"),
)
_METHODS: Final = ("GET", "HEAD")


@dataclass(frozen=True)
class _File:
    """A file as it is sent: its content, its headers, and the tag of its content."""

    content: bytes
    headers: tuple[tuple[bytes, bytes], ...]
    tag: bytes


def serves(route: str) -> bool:
    """Whether a route, without a proxy's prefix and a trailing slash, is one of the playground's."""
    return route == PREFIX or route.startswith(f"{PREFIX}/")


async def answer(scope: Message, send: Send) -> None:
    """Answers a request for the page or one of its files; 404 for any other name, 405 for any other method."""
    route = route_of(scope)
    if scope["method"] not in _METHODS:
        allow = [(b"allow", ", ".join(_METHODS).encode())]
        await send_error(send, f"{route} is only read", "method", 405, allow)
        return
    if route == PREFIX and not scope["path"].endswith("/"):
        # The page names its files relative to this, whatever prefixes proxies put before it.
        location = (b"location", f"{PREFIX[1:]}/".encode())
        await _send(send, scope, 307, (location, *_HEADERS), b"")
        return
    name = route.removeprefix(PREFIX).removeprefix("/")
    slashed, twice = scope["path"].endswith("/"), scope["path"].endswith("//")
    if name not in FILES or slashed == bool(name) or twice:
        await send_error(send, f"there is no {route}", "path", 404)
        return
    found = _read(name)
    given = (value for header, value in scope["headers"] if header == b"if-none-match")
    if found.tag in next(given, b""):
        await _send(send, scope, 304, (*_HEADERS, (b"etag", found.tag)), b"")
    else:
        await _send(send, scope, 200, found.headers, found.content)


async def _send(
    send: Send, scope: Message, status: int, headers: tuple[tuple[bytes, bytes], ...], body: bytes
) -> None:
    length = (b"content-length", str(len(body)).encode())
    headers = headers if status == 304 else (*headers, length)
    await send({"type": "http.response.start", "status": status, "headers": list(headers)})
    body = b"" if scope["method"] == "HEAD" else body
    await send({"type": "http.response.body", "body": body})


@cache
def _read(name: str) -> _File:
    """Reads one of ``FILES`` from the package."""
    file, kind = FILES[name]
    content = (files("vllm_steer.serving") / "page" / file).read_bytes()
    tag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'.encode()
    return _File(content, ((b"content-type", kind.encode()), *_HEADERS, (b"etag", tag)), tag)
