"""The model of a body is read and replaced as the reader of vLLM would see it, and little else is read."""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from typing import Any

import pytest
from starlette._utils import get_route_path

from vllm_steer.serving.asgi import key_digest, model_of, read_limited, route_of, with_model

_MANY = 100_000


@pytest.mark.parametrize(
    "body",
    [
        b'{"model": "demo:calm"}',
        b'{"mod\\u0065l": "demo\\u003acalm"}',
        b'{"model": "plain", "model": "demo:calm"} \n',
        b'{"a": NaN, "model": "demo:calm"}',
        b'{"a": "\\ud800", "model": "demo:calm"}',
        b'{"a": "\\\\ud800\\\\", "model": "demo:calm"}',
        b'{"a": ["\\udc00\\\\"], "model": "demo:calm", "b": "}"}',
        b'\xef\xbb\xbf{"model": "demo:calm"}',
        '{"model": "demo:calm", "a": "é"}'.encode("utf-16"),
        '{"a": "é", "model": "demo:calm"}'.encode("utf-16-be"),
        '{"model": "demo:calm"}'.encode("utf-32"),
    ],
)
def test_a_model_is_read_and_replaced_in_whatever_vllm_reads(body: bytes) -> None:
    assert model_of(body) == json.loads(body)["model"] == "demo:calm"
    assert json.loads(with_model(body, "demo")) == json.loads(body) | {"model": "demo"}


@pytest.mark.parametrize(
    "body",
    [b"", b"[1]", b'{"a": 1}', b'{"model": ["demo:calm"]}', b'{"model": "demo:calm"', b"\xff"],
)
def test_what_names_no_model_has_none(body: bytes) -> None:
    assert model_of(body) is None


@pytest.mark.parametrize("key", ["k", "s\ud800"])
def test_many_keys_are_not_made_into_objects(key: str) -> None:
    """Beside the same machine's reader of the whole."""
    body = json.dumps({f"{key}{n}": n for n in range(_MANY)} | {"model": "demo:calm"}).encode()
    times: dict[str, list[float]] = {"whole": [], "model": []}
    for _ in range(5):
        for name, read in (("whole", json.loads), ("model", model_of)):
            started = time.process_time()
            assert read(body)
            times[name].append(time.process_time() - started)
    assert min(times["model"]) < 0.8 * min(times["whole"])


@pytest.mark.parametrize("root", ["", "/", "/v", "/v1", "/proxy", "/proxy/v1"])
@pytest.mark.parametrize("path", ["/v1/completions", "/proxy/v1/completions", "/proxyv1/x", "/"])
def test_a_route_is_what_the_application_finds(root: str, path: str) -> None:
    """A prefix may be the beginning of a name."""
    scope = {"path": path, "root_path": root}
    assert route_of(scope) == get_route_path(scope).rstrip("/")


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1"])
def test_a_key_is_the_same_in_both_encodings(encoding: str) -> None:
    """vLLM lets in what is sent in Latin-1, and the policy must know it."""
    sent = "Bearer cl\xe9".encode(encoding)
    digest = hashlib.sha256("cl\xe9".encode()).hexdigest()
    assert key_digest({"headers": [(b"authorization", sent)]}) == digest


@pytest.mark.parametrize(
    ("last", "found"),
    [
        ({"type": "http.disconnect"}, None),
        ({"type": "http.request", "body": b" "}, b"{} "),
    ],
)
def test_a_body_that_ends_too_early_is_none(last: dict[str, Any], found: bytes | None) -> None:
    """What has come of it may look whole, as all but the blanks at its end."""
    messages = iter([{"type": "http.request", "body": b"{}", "more_body": True}, last])

    async def receive() -> dict[str, Any]:
        return next(messages)

    assert asyncio.run(read_limited(receive, 10)) == found
