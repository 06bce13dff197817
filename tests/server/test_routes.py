"""Every route of vLLM's server: steered with a receipt, or refused; none answers as if nothing had been asked."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from offline.demo.server import SERVED_NAME, Server, serve
from vllm_steer.pack import SteeringPack

pytestmark = pytest.mark.server
CALM: dict[str, Any] = {"directions": [{"name": "moods/cheerful", "scale": 9.0}]}
LATE = CALM | {"positions": "generated"}
GLOOMY: dict[str, Any] = {"directions": [{"name": "moods/gloomy", "scale": 2.0}]}


@pytest.fixture(scope="module")
def server(
    model: Path, packs: list[SteeringPack], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("routes")
    policy = {"aliases": {"cheerful": CALM, "late": LATE}, "default": GLOOMY}
    (folder / "policy.json").write_text(json.dumps(policy))
    options = ["--steering-policy", str(folder / "policy.json"), "--enforce-eager"]
    paths = [pack.path for pack in packs]
    with serve(model, paths, folder / "log", *options) as running:
        yield running


SAID = [{"role": "user", "content": "Hello"}]
# What each route that generates takes, and the ways of asking that it carries out; the others it must refuse.
OPENAI = {"object", "flat", "xargs", "alias", "default", "none"}
GENERATING: dict[str, tuple[dict[str, Any], set[str]]] = {
    "/v1/chat/completions": ({"messages": SAID, "max_tokens": 4}, OPENAI),
    "/v1/completions": ({"prompt": "Hello", "max_tokens": 4}, OPENAI),
    "/v1/responses": ({"input": "Hello", "max_output_tokens": 4}, OPENAI),
    "/v1/messages": ({"messages": SAID, "max_tokens": 4}, {"xargs", "alias", "default"}),
    "/v1/chat/completions/batch": (
        {"messages": [SAID, SAID], "max_tokens": 4},
        {"alias", "default"},
    ),
    "/invocations": ({"messages": SAID, "max_tokens": 4}, {"alias", "default"}),
    "/generative_scoring": (
        {"query": "Hello", "items": ["rain", "snow"], "label_token_ids": [20, 21]},
        {"alias", "default"},
    ),
}
# Of a kind of model that is not served here.
ELSEWHERE = {"/v1/systemone"}
# They generate nothing, whatever model they are asked for.
OTHERS = {
    "/detokenize",
    "/is_scaling_elastic_ep",
    "/ping",
    "/scale_elastic_ep",
    "/tokenize",
    "/v1/messages/count_tokens",
    "/v1/responses/{response_id}/cancel",
}
ASKS: dict[str, tuple[dict[str, Any], str]] = {
    "object": ({"steering": CALM}, "moods/cheerful"),
    "flat": ({"steer": ["moods/cheerful:9"]}, "moods/cheerful"),
    "xargs": ({"vllm_xargs": {"steer": ["moods/cheerful:9"]}}, "moods/cheerful"),
    "alias": ({"model": f"{SERVED_NAME}:cheerful"}, "moods/cheerful"),
    "default": ({}, "moods/gloomy"),
    "none": ({"steering": "none"}, ""),
    "extra_body": ({"extra_body": {"steering": CALM}}, ""),
    "extra_args": ({"extra_args": {"steer": ["moods/cheerful:9"]}}, ""),
    "extra_body in extra_body": ({"extra_body": {"vllm_xargs": {"steer": ["moods/calm"]}}}, ""),
    "extra_body as text": ({"extra_body": json.dumps({"steering": CALM})}, ""),
    "misspelt": ({"sterring": CALM}, ""),
}


def ask(server: Server, route: str, fields: dict[str, Any]) -> httpx.Response:
    body = {"model": SERVED_NAME} | fields
    return httpx.post(server.url.removesuffix("/v1") + route, json=body, timeout=60)


def test_somebody_has_decided_on_every_route(server: Server) -> None:
    paths = httpx.get(server.url.removesuffix("/v1") + "/openapi.json").json()["paths"]
    found = {path for path, methods in paths.items() if "post" in methods}
    assert found <= {*GENERATING, *ELSEWHERE, *OTHERS}, "say of each new route what it does"


@pytest.mark.parametrize("how", list(ASKS))
@pytest.mark.parametrize("route", list(GENERATING))
def test_each_is_steered_with_a_receipt_or_refused(server: Server, route: str, how: str) -> None:
    body, carried = GENERATING[route]
    fields, name = ASKS[how]
    answer = ask(server, route, body | fields)
    if how not in carried:
        assert 400 <= answer.status_code < 500, answer.text
        assert "steer" in answer.text or how in answer.text
        return
    assert answer.status_code == 200, answer.text
    if not name:
        assert "steering" not in answer.json()
        assert "x-steering" not in answer.headers
        return
    receipts = answer.json()["steering"]
    assert receipts
    for receipt in receipts:
        assert [direction["name"] for direction in receipt["directions"]] == [name]
        assert receipt["tokens_steered"] > 0
    assert answer.headers["x-steering"].startswith(name)


@pytest.mark.parametrize("route", ["/v1/messages", "/invocations"])
def test_streams_end_with_a_receipt(server: Server, route: str) -> None:
    fields = {"model": f"{SERVED_NAME}:cheerful", "stream": True}
    answer = ask(server, route, GENERATING[route][0] | fields)
    assert answer.headers["x-steering"] == "moods/cheerful:9"
    chunks = [
        json.loads(line.removeprefix("data: "))
        for line in answer.text.splitlines()
        if line.startswith("data: {")
    ]
    (stamped,) = [chunk for chunk in chunks if chunk.get("steering")]
    assert stamped["steering"][0]["tokens_steered"] > 0


def test_what_does_not_generate_takes_an_alias_for_its_model(server: Server) -> None:
    alias = {"model": f"{SERVED_NAME}:cheerful"}
    for route, body in (
        ("/tokenize", {"prompt": "Hello"}),
        ("/v1/messages/count_tokens", {"messages": SAID}),
    ):
        plain, aliased = ask(server, route, body), ask(server, route, body | alias)
        assert plain.status_code == aliased.status_code == 200
        assert plain.json() == aliased.json()
        assert "x-steering" not in aliased.headers
    assert ask(server, "/tokenize", {"prompt": "Hello", "steering": CALM}).status_code == 400


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_what_steers_no_token_is_refused(server: Server, max_tokens: int) -> None:
    """As harnesses send it that score texts by their log-likelihood."""
    scoring = {"prompt": "Hello", "max_tokens": max_tokens, "echo": True, "logprobs": 1}
    for fields in ({"model": f"{SERVED_NAME}:late"}, {"steering": LATE}):
        answer = ask(server, "/v1/completions", scoring | fields)
        assert answer.status_code == 400, answer.text
        assert "no token is steered" in answer.text
    for fields in ({"model": f"{SERVED_NAME}:cheerful"}, {"steering": LATE | {"positions": "all"}}):
        (receipt,) = ask(server, "/v1/completions", scoring | fields).json()["steering"]
        assert receipt["tokens_steered"] > 0


@pytest.mark.parametrize("encoding", ["utf-16", "utf-8"])
def test_bodies_in_any_form_that_vllm_reads_are_looked_into(server: Server, encoding: str) -> None:
    """In another encoding, or too strange for the faster reader, and large."""
    root, more = server.url.removesuffix("/v1"), {"metadata": {"a": "\ud800" + "x" * 2**20}}
    for route, fields in (
        ("/v1/messages", {"steering": CALM}),
        ("/invocations", {"model": f"{SERVED_NAME}:cheerful"}),
    ):
        body = {"model": SERVED_NAME} | GENERATING[route][0] | fields
        text = json.dumps(body | (more if encoding == "utf-8" else {}))
        headers = {"content-type": "application/json"}
        answer = httpx.post(
            root + route, content=text.encode(encoding), headers=headers, timeout=60
        )
        steered = answer.status_code == 200 and "x-steering" in answer.headers
        assert steered or 400 <= answer.status_code < 500, answer.text


def test_a_route_that_does_not_exist_is_not_read(server: Server) -> None:
    assert ask(server, "/v1/nothing", {"steering": CALM}).status_code == 404
