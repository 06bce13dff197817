"""Steering that stands inside a message, where vLLM drops it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from vllm_steer.serving.misplaced import beside, misplaced

SAID = {"role": "user", "content": "Hello"}
STEERING = {"directions": [{"name": "fears/spiders"}]}
PART = {"type": "text", "text": "Hello"}
TOOL = {
    "type": "function",
    "function": {"name": "drive", "parameters": {"properties": {"steering": {"type": "number"}}}},
}


@pytest.mark.parametrize(
    ("place", "body"),
    [
        ("messages[1].steering", {"messages": [SAID, SAID | {"steering": STEERING}]}),
        ("messages[0].steer", {"messages": [SAID | {"steer": ["fears/spiders"]}]}),
        ("messages[0].steer_positions", {"messages": [SAID | {"steer_positions": "all"}]}),
        (
            "messages[0].content[1].steering",
            {"messages": [SAID | {"content": [PART, PART | {"steering": STEERING}]}]},
        ),
        ("messages[1][0].steering", {"messages": [[SAID], [SAID | {"steering": STEERING}]]}),
        ("input[0].steering", {"input": [SAID | {"steering": STEERING}]}),
        ("input[0].content[0].steering", {"input": [{"content": [PART | {"steering": STEERING}]}]}),
        ("stream_options.steering", {"stream_options": {"steering": STEERING}}),
    ],
)
def test_its_place_is_named(place: str, body: dict[str, Any]) -> None:
    for encoding in ("utf-8", "utf-16"):
        assert misplaced(json.dumps(body).encode(encoding)) == place
    # What stricter parsers than vLLM's refuse, in a field that is passed over and beside it.
    for more in ({"k": float("nan")}, {"k": "\ud800"}, {"k\ud800": [{}] * 9}):
        assert misplaced(json.dumps(body | more).encode()) == place


@pytest.mark.parametrize(
    "body",
    [
        {"messages": [SAID], "steering": STEERING},
        {"messages": [SAID], "vllm_xargs": {"steering": STEERING}},
        {"messages": [SAID | {"content": 'say "steering": now'}]},
        {"messages": [SAID], "tools": [TOOL]},
        {"messages": [{"role": "assistant", "tool_calls": [{"input": {"steering": 0.5}}]}]},
        {"messages": [SAID | {"content": [{"type": "tool_use", "input": {"steering": 0.5}}]}]},
        {"messages": [SAID], "metadata": {"steering": "mine"}},
        {"input": 'a "steering" wheel'},
        {"messages": None, "input": 3, "stream_options": ["steering"]},
        ["steering"],
    ],
)
def test_what_is_in_its_place_or_the_clients_own_passes(body: Any) -> None:
    assert misplaced(json.dumps(body).encode()) is None


def test_what_is_no_json_is_left_to_the_route() -> None:
    assert misplaced(b'{"messages": [{"steering": ') is None


@pytest.mark.parametrize(
    ("headers", "query", "place"),
    [
        ([], b"", None),
        ([(b"x-steering", b"{}")], b"", "header x-steering"),
        ([(b"steer", b"a:1")], b"", "header steer"),
        ([], b"steering=", "query steering"),
        ([], b"a=1&st%65er_layers=2", "query steer_layers"),
        ([(b"x-stainless-lang", b"x-steering"), (b"te", b"steer")], b"a=steer&stream=1", None),
        ([(b"caf\xe9", b"")], b"\xe9=\xff&&=", None),
    ],
)
def test_what_stands_beside_the_body_is_named(
    headers: list[tuple[bytes, bytes]], query: bytes, place: str | None
) -> None:
    assert beside({"headers": headers, "query_string": query}) == place
