"""Every route of vLLM's server: steered with a receipt, or refused; none answers as if nothing had been asked."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

from vllm_steer.offline.demo.server import SERVED_NAME, Server, serve
from vllm_steer.packs.pack import SteeringPack

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
    options.append("--enable-scale-out")
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
    "/inference/v1/generate": (
        {"token_ids": [20, 21, 22], "sampling_params": {"max_tokens": 4}},
        {"alias", "default", "extra_args of the engine"},
    ),
}
# Of kinds of models, and of a client's package, that are not here.
ELSEWHERE = {"/v1/systemone", "/cohere/v2/chat", "/cohere/v2/chat/render"}
# They make a prompt, or text of tokens, for a server that generates.
RENDERING: dict[str, dict[str, Any]] = {
    "/v1/chat/completions/render": {"messages": SAID, "max_tokens": 4},
    "/v1/completions/render": {"prompt": "Hello", "max_tokens": 4},
    "/v1/messages/render": {"messages": SAID, "max_tokens": 4},
    "/v1/responses/render": {"input": "Hello", "max_output_tokens": 4},
}
# They generate nothing, whatever model they are asked for.
OTHERS = {
    "/v1/chat/completions/derender",
    "/v1/completions/derender",
    "/inference/v1/abort_requests",
    "/adapters",
    "/v1/load_lora_adapter",
    "/v1/unload_lora_adapter",
    "/start_profile",
    "/stop_profile",
    "/fault_tolerance/apply",
    # Of developers, who may do anything with the engine.
    "/abort_requests",
    "/collective_rpc",
    "/finish_weight_update",
    "/init_weight_transfer_engine",
    "/pause",
    "/release_kv_cache_memory",
    "/reset_encoder_cache",
    "/reset_mm_cache",
    "/reset_prefix_cache",
    "/resume",
    "/shutdown_weight_transfer_engine",
    "/sleep",
    "/start_draft_weight_update",
    "/start_weight_update",
    "/update_weight_version",
    "/update_weights",
    "/wake_up",
    "/weight_checker",
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
    "extra_args of the engine": (
        {"sampling_params": {"max_tokens": 4, "extra_args": {"steering": CALM}}},
        "moods/cheerful",
    ),
    "params of the engine": ({"sampling_params": {"max_tokens": 4, "steering": CALM}}, ""),
}


def ask(server: Server, route: str, fields: dict[str, Any]) -> httpx.Response:
    body = {"model": SERVED_NAME} | fields
    return httpx.post(server.url.removesuffix("/v1") + route, json=body, timeout=60)


@pytest.fixture
def application(monkeypatch: pytest.MonkeyPatch) -> Any:
    """vLLM's own, with all that a flag or a variable adds to it."""
    return built(monkeypatch, "generate")


def built(monkeypatch: pytest.MonkeyPatch, *tasks: str) -> Any:
    """vLLM's application for a model that has some tasks."""
    from vllm.entrypoints.launchers.app import build_app
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    monkeypatch.setenv("VLLM_SERVER_DEV_MODE", "1")
    monkeypatch.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "1")
    parser = make_arg_parser(FlexibleArgumentParser())
    args = parser.parse_args(["--enable-scale-out", "--tokens-only", "--api-key", "secret"])
    args.enable_fault_tolerance = True
    return build_app(args, tasks)


def test_a_key_is_checked_before_a_body_is_looked_into(application: Any) -> None:
    order = [each.cls.__name__ for each in application.user_middleware]
    ours = [order.index("SteeringMiddleware"), order.index("SteeringGuard")]
    assert order.index("AuthenticationMiddleware") < min(ours)


def test_somebody_has_decided_on_every_route(application: Any) -> None:
    app = application
    found = {
        route.path for route in app.routes if "POST" in (getattr(route, "methods", None) or ())
    }
    assert found >= GENERATING.keys() | RENDERING.keys()
    decided = GENERATING.keys() | RENDERING.keys() | ELSEWHERE | OTHERS
    assert found <= decided, "say of each new route what it does"


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


@pytest.mark.parametrize(
    "route", [route for route, (body, _) in GENERATING.items() if SAID in body.values()]
)
def test_steering_inside_a_message_is_refused(server: Server, route: str) -> None:
    """vLLM reads what it knows of a message and drops the rest."""
    said = [SAID[0] | {"steering": CALM}]
    answer = ask(server, route, GENERATING[route][0] | {"messages": said})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == "messages[0].steering"


@pytest.mark.parametrize("route", list(RENDERING))
def test_what_renders_for_another_server_is_not_asked_to_steer(server: Server, route: str) -> None:
    """That server would not be told; the default is its own."""
    for how, (fields, _) in ASKS.items():
        answer = ask(server, route, RENDERING[route] | fields)
        if how in {"default", "none"}:
            assert answer.status_code == 200 or how == "none"
        elif not how.endswith("of the engine"):
            assert 400 <= answer.status_code < 500, (how, answer.text)


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
        assert "no token would be steered" in answer.text
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


def test_a_server_without_reads_names_the_flag(server: Server) -> None:
    body = GENERATING["/v1/completions"][0] | {"steering": {"read": [{"name": "moods/cheerful"}]}}
    refused = ask(server, "/v1/completions", body)
    assert refused.status_code == 400
    assert "--steering-reads" in refused.json()["error"]["message"]


KEY = {"authorization": "Bearer secret"}


@pytest.mark.parametrize("route", ["/v1/audio/transcriptions", "/v1/audio/translations"])
@pytest.mark.parametrize("encoded", [False, True])
@pytest.mark.parametrize(
    "field", ["steering", "steer", "X-Steering", "steering[directions][0][name]"]
)
def test_steering_in_a_form_is_refused(
    field: str, encoded: bool, route: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM reads what it knows of a form and drops the rest."""
    client = TestClient(built(monkeypatch, "generate", "transcription"))
    fields = {"model": SERVED_NAME, field: "moods/cheerful"}
    audio = None if encoded else {"file": ("steering.wav", b'name="steering"\r\n', "audio/wav")}
    answer = client.post(route, data=fields, files=audio, headers=KEY)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == field


def test_a_second_kind_of_body_hides_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    client = TestClient(built(monkeypatch, "generate"))
    kinds = ["application/json", "application/x-www-form-urlencoded"]
    headers = [*KEY.items(), *(("content-type", kind) for kind in kinds)]
    body = json.dumps({"model": SERVED_NAME, "messages": SAID, "max_tokens": 4, "steering": CALM})
    answer = client.post("/v1/messages", content=body, headers=headers)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == "steering"


def test_a_form_without_steering_reaches_its_route(monkeypatch: pytest.MonkeyPatch) -> None:
    app = built(monkeypatch, "generate", "transcription")
    audio = {"file": ("steering.wav", b'name="steering"\r\n', "audio/wav")}
    answer = TestClient(app).post(
        "/v1/audio/transcriptions", data={"stream": "maybe"}, files=audio, headers=KEY
    )
    assert "steering" not in answer.text
    assert "stream" in answer.text


@pytest.mark.parametrize(
    "message",
    [
        {"type": "session.update", "model": SERVED_NAME, "steering": CALM},
        {"type": "session.update", "session": {"steer": ["moods/cheerful"]}},
    ],
)
def test_a_web_socket_that_is_asked_to_steer_is_ended(
    message: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    app = built(monkeypatch, "generate", "realtime")
    app.state.openai_serving_realtime = SimpleNamespace()
    with TestClient(app).websocket_connect("/v1/realtime", headers=KEY) as socket:
        assert socket.receive_json()["type"] == "session.created"
        socket.send_json({"type": "unknown"})
        assert socket.receive_json()["type"] == "error"
        socket.send_json(message)
        with pytest.raises(WebSocketDisconnect) as ended:
            socket.receive_json()
    assert ended.value.code == 1008
    assert "does not support steering" in ended.value.reason


def test_a_route_that_does_not_exist_is_not_read(server: Server) -> None:
    assert ask(server, "/v1/nothing", {"steering": CALM}).status_code == 404
