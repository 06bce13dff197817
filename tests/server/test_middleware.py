"""Aliases, receipts, limits, permissions, waiting for rows and metrics, on a real server."""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import AsyncOpenAI, BadRequestError, OpenAI

from tests.unit.test_dashboard import DASHBOARD
from tests.unit.test_layout import ROOT
from vllm_steer import SteeringPack, steer
from vllm_steer.offline.demo.corpus import user_text
from vllm_steer.offline.demo.server import SERVED_NAME, Server, serve
from vllm_steer.offline.questions.statements import statements

pytestmark = pytest.mark.server
TEXTS = [user_text(statement.text) for statement in statements("heldout")[:8]]
KEY, GUEST = "the-key-of-a-friend", "another-key"
CALM: dict[str, Any] = {"directions": [{"name": "moods/cheerful", "scale": 9.0}]}
TOKENS = 12
PAGE = ROOT / "docs" / "how-to" / "monitor.md"
PRIVATE = "The-heron-and-the-lighthouse"


@pytest.fixture(scope="module")
def server(
    model: Path, packs: list[SteeringPack], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("front")
    policy = {
        "aliases": {"cheerful": CALM},
        "max_dose": 3.0,
        "dose_action": "reduce",
        "keys": {hashlib.sha256(KEY.encode()).hexdigest(): ["*"], "*": ["moods/*"]},
    }
    (folder / "policy.json").write_text(json.dumps(policy))
    options = ["--steering-policy", str(folder / "policy.json"), "--steering-rows", "4"]
    options += ["--enable-log-requests", "--steering-reads", "1"]
    paths = [pack.path for pack in packs]
    with serve(model, paths, folder / "log", "--enforce-eager", *options) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Server) -> OpenAI:
    return OpenAI(base_url=server.url, api_key=KEY, max_retries=0)


def chat(client: OpenAI, text: str, model: str = SERVED_NAME, **extra_body: Any) -> Any:
    return client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": text}],
        max_tokens=TOKENS,
        temperature=0.0,
        extra_body={"ignore_eos": True} | extra_body,
    )


def text_of(response: Any) -> str:
    return response.choices[0].message.content or ""


def test_a_model_name_stands_for_a_steering(client: OpenAI) -> None:
    names = [card.id for card in client.models.list().data]
    assert names == [SERVED_NAME, f"{SERVED_NAME}:cheerful"]
    aliased = chat(client, TEXTS[0], model=names[1])
    assert text_of(aliased) == text_of(chat(client, TEXTS[0], steering=CALM))
    assert text_of(aliased) != text_of(chat(client, TEXTS[0]))
    assert aliased.model_extra["steering"][0]["directions"][0]["name"] == "moods/cheerful"
    flat = {"steer": ["fears/spiders:3"]}
    for beside in ({"steering": CALM}, flat, {"vllm_xargs": flat}, {"steering": "none"}):
        with pytest.raises(BadRequestError, match="is an alias that steers"):
            chat(client, TEXTS[0], model=names[1], **beside)
    with pytest.raises(BadRequestError, match="does not support beam search"):
        chat(client, TEXTS[0], model=names[1], use_beam_search=True, n=2)
    with pytest.raises(Exception, match="does not exist"):
        chat(client, TEXTS[0], model=f"{SERVED_NAME}:unknown")


def test_receipts(client: OpenAI, packs: list[SteeringPack]) -> None:
    body = steer({"moods/cheerful": 9.0, "moods/gloomy": 1.0}, layers=[2, 3], positions="generated")
    response = chat(client, TEXTS[0], **body)
    (receipt,) = response.model_extra["steering"]
    digests = next(pack for pack in packs if pack.name == "moods").digests
    found = {d["name"]: (d["scale"], d["layers"], d["digest"]) for d in receipt["directions"]}
    assert found == {
        "moods/cheerful": (9.0, [2, 3], digests["cheerful"]),
        "moods/gloomy": (1.0, [2, 3], digests["gloomy"]),
    }
    prompt = response.usage.prompt_tokens
    assert receipt["positions"] == [{"start": prompt, "end": None, "directions": [0, 1]}]
    # The model never reads the last token.
    assert receipt["tokens_steered"] == response.usage.completion_tokens - 1 == TOKENS - 1
    assert receipt["dose_factor"] == 1.0
    raw = client.chat.completions.with_raw_response.create(
        model=SERVED_NAME,
        messages=[{"role": "user", "content": TEXTS[0]}],
        max_tokens=2,
        extra_body=body,
    )
    assert sorted(raw.headers["x-steering"].split(", ")) == ["moods/cheerful:9", "moods/gloomy:1"]
    assert "steering" not in chat(client, TEXTS[0]).model_extra


def test_receipts_of_several_prompts_and_answers(client: OpenAI) -> None:
    response = client.completions.create(
        model=SERVED_NAME,
        prompt=TEXTS[:2],
        n=2,
        temperature=1.0,
        max_tokens=TOKENS,
        extra_body={"steering": CALM, "ignore_eos": True},
    )
    receipts = response.model_extra["steering"]
    assert len(receipts) == 2
    total = sum(receipt["tokens_steered"] for receipt in receipts)
    # vLLM counts a prompt once, however many answers it gets.
    assert total == 2 * response.usage.prompt_tokens + 4 * (TOKENS - 1)


@pytest.mark.parametrize("route", ["chat", "completions", "responses"])
def test_receipts_of_streams(route: str, client: OpenAI) -> None:
    extra: dict[str, Any] = {"steering": CALM, "ignore_eos": True}
    if route == "chat":
        chunks = list(
            client.chat.completions.create(
                model=SERVED_NAME,
                messages=[{"role": "user", "content": TEXTS[0]}],
                max_tokens=TOKENS,
                stream=True,
                extra_body=extra,
            )
        )
        stamped = [c for c in chunks if c.choices[0].finish_reason]
        others = [c for c in chunks if not c.choices[0].finish_reason]
        (receipt,) = stamped[0].model_extra["steering"]
        assert not any("steering" in c.model_extra for c in others)
    elif route == "completions":
        stream = client.completions.create(
            model=SERVED_NAME,
            prompt=TEXTS[0],
            max_tokens=TOKENS,
            n=2,
            stream=True,
            extra_body=extra,
        )
        stamped = [c for c in stream if c.choices and c.choices[0].finish_reason]
        assert len(stamped) == 2
        (receipt,) = stamped[1].model_extra["steering"]
    else:
        events = list(
            client.responses.create(
                model=SERVED_NAME,
                input=TEXTS[0],
                max_output_tokens=TOKENS,
                stream=True,
                extra_body=extra,
            )
        )
        (receipt,) = events[-1].response.model_extra["steering"]
    assert receipt["directions"][0]["name"] == "moods/cheerful"
    assert receipt["tokens_steered"] > TOKENS


def test_too_strong_a_dose_is_lowered(client: OpenAI) -> None:
    strong = {"directions": [{"name": "moods/cheerful", "scale": 500.0}]}
    (receipt,) = (response := chat(client, TEXTS[0], steering=strong)).model_extra["steering"]
    assert receipt["dose"] == pytest.approx(3.0)
    assert receipt["dose_factor"] < 1
    scale = receipt["directions"][0]["scale"]
    assert scale == pytest.approx(500 * receipt["dose_factor"])
    asked = {"directions": [{"name": "moods/cheerful", "scale": scale}]}
    assert text_of(response) == text_of(chat(client, TEXTS[0], steering=asked))


def test_a_key_may_use_what_it_may_use(server: Server, client: OpenAI) -> None:
    guest = OpenAI(base_url=server.url, api_key=GUEST, max_retries=0)
    fear = {"directions": [{"name": "fears/spiders"}]}
    assert chat(client, TEXTS[0], steering=fear).model_extra["steering"]
    assert chat(guest, TEXTS[0], steering=CALM).model_extra["steering"]
    for name in ("fears/spiders", "spiders", "fears/unknown"):
        with pytest.raises(BadRequestError, match="this API key is not allowed to use"):
            chat(guest, TEXTS[0], steering={"directions": [{"name": name}]})


def test_a_key_is_the_same_on_every_route(server: Server) -> None:
    """And the first of several, as it is for vLLM."""
    from vllm.entrypoints.anthropic.protocol import AnthropicMessagesRequest

    def status(route: str, *keys: str, steer: str = "fears/spiders") -> int:
        body = {
            "model": SERVED_NAME,
            "max_tokens": 4,
            "messages": [{"role": "user", "content": "a"}],
            "vllm_xargs": {"steer": [steer]},
        }
        headers = [("authorization", f"Bearer {key}") for key in keys]
        answer = httpx.post(f"{server.url}/{route}", json=body, headers=headers, timeout=60)
        return answer.status_code

    routes = ["chat/completions"]
    if "vllm_xargs" in AnthropicMessagesRequest.model_fields:
        routes.append("messages")
    for route in routes:
        assert status(route, KEY) == 200
        assert status(route, GUEST) == 400
        assert status(route, KEY, GUEST) == 200
        assert status(route, GUEST, KEY) == 400
        assert status(route, GUEST, steer="moods/cheerful") == 200
        assert status(route) == 400


def test_more_steerings_than_rows_wait_for_their_turn(client: OpenAI, server: Server) -> None:
    """Three sums fit; twelve different ones arrive at once, and one client goes away."""
    steerings = [
        {"directions": [{"name": "moods/cheerful", "scale": 1.0 + 0.5 * number}]}
        for number in range(12)
    ]
    alone = [text_of(chat(client, TEXTS[n % 8], steering=s)) for n, s in enumerate(steerings)]

    async def together() -> list[str]:
        async with AsyncOpenAI(base_url=server.url, api_key=KEY, max_retries=0) as many:
            tasks = [
                asyncio.create_task(
                    many.chat.completions.create(
                        model=SERVED_NAME,
                        messages=[{"role": "user", "content": TEXTS[n % 8]}],
                        max_tokens=TOKENS,
                        temperature=0.0,
                        extra_body={"steering": steering, "ignore_eos": True},
                    )
                )
                for n, steering in enumerate([*steerings, steerings[0]])
            ]
            await asyncio.sleep(0.05)
            tasks.pop().cancel()
            return [text_of(response) for response in await asyncio.gather(*tasks)]

    assert asyncio.run(together()) == alone


def metrics(server: Server) -> dict[str, float]:
    text = httpx.get(server.url.removesuffix("/v1") + "/metrics").text
    lines = [line for line in text.splitlines() if line.startswith("steering:")]
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}


def test_metrics_add_up(server: Server, client: OpenAI) -> None:
    before = metrics(server)
    steered = [chat(client, text, steering=CALM) for text in TEXTS[:3]]
    chat(client, TEXTS[0])
    with pytest.raises(BadRequestError):
        chat(client, TEXTS[0], steering={"directions": [{"name": "moods/nobody"}]})
    # Refused before anything else is looked at, each in a place of its own.
    twice = {"steering": CALM, "vllm_xargs": {"steering": json.dumps(CALM)}}
    for model, body in (
        (SERVED_NAME, twice),
        (SERVED_NAME, {"steering": CALM, "use_beam_search": True, "n": 2}),
        (f"{SERVED_NAME}:cheerful", {"steering": CALM}),
    ):
        with pytest.raises(BadRequestError):
            chat(client, TEXTS[0], model=model, **body)
    said = [{"role": "user", "content": TEXTS[0]}]
    dropped = {"model": SERVED_NAME, "messages": said, "max_tokens": 4, "steering": CALM}
    assert httpx.post(f"{server.url}/messages", json=dropped).status_code == 400
    after = metrics(server)

    def grown(name: str) -> float:
        return after[name] - before.get(name, 0.0)

    assert grown('steering:requests_total{outcome="finished"}') == 3
    assert grown('steering:rejected_total{reason="unknown_direction"}') == 1
    assert grown('steering:rejected_total{reason="malformed"}') == 2
    assert grown('steering:rejected_total{reason="unsupported"}') == 2
    tokens = sum(r.model_extra["steering"][0]["tokens_steered"] for r in steered)
    assert grown("steering:steered_tokens_total") == tokens
    assert grown("steering:dose_count") == 3
    assert after["steering:active_requests"] == after["steering:waiting_requests"] == 0
    assert after["steering:active_directions"] == 0
    assert after['steering:loaded_directions{pack="moods"}'] == 2


def test_directions_in_use_are_counted_while_they_are(server: Server, client: OpenAI) -> None:
    two = {"directions": [{"name": "moods/cheerful"}, {"name": "moods/gloomy"}]}
    stream = client.chat.completions.create(
        model=SERVED_NAME,
        messages=[{"role": "user", "content": TEXTS[0]}],
        max_tokens=200,
        stream=True,
        extra_body={"steering": two, "ignore_eos": True},
    )
    next(iter(stream))
    assert metrics(server)["steering:active_directions"] == 2
    assert sum(1 for _ in stream) > 0
    assert metrics(server)["steering:active_directions"] == 0


def test_packs_are_listed(server: Server, packs: list[SteeringPack]) -> None:
    def names(key: str) -> tuple[list[str], list[dict[str, Any]]]:
        headers = {"authorization": f"Bearer {key}"}
        found = httpx.get(server.url + "/steering/packs", headers=headers).json()["packs"]
        return [pack["name"] for pack in found], found

    # To each as far as it may use them.
    assert names(GUEST)[0] == ["moods"]
    shown, listed = names(KEY)
    assert shown == [pack.name for pack in packs]
    assert listed[0]["directions"][0]["digest"] in packs[0].digests.values()


def test_planning_is_timed(server: Server, client: OpenAI) -> None:
    chat(client, TEXTS[0], steering=CALM)
    assert metrics(server)["steering:planning_seconds"] > 0


def logged(server: Server, event: str) -> list[dict[str, Any]]:
    """Fields of the lines that the log has of an event."""
    found = re.findall(rf"Steering {event}: (\{{.*\}})$", server.log.read_text(), re.MULTILINE)
    return [json.loads(fields) for fields in found]


def test_the_log_tells_what_was_done_and_refused(
    server: Server, client: OpenAI, packs: list[SteeringPack]
) -> None:
    digests = {pack.name: pack.manifest.tensors.sha256 for pack in packs}
    (started,) = logged(server, "started")
    assert started["packs"] == digests
    assert started["rows"] == 4
    assert started["policy"]["aliases"] == ["cheerful"]
    (worker,) = logged(server, "worker ready")
    assert worker["layers"] == started["layers"]

    response = chat(client, f"{PRIVATE} {TEXTS[0]}", steering=CALM)
    (receipt,) = response.model_extra["steering"]
    line = logged(server, "request")[-1]
    assert response.id == line["request_id"]
    example = re.search(r"^Steering request: (.*)$", PAGE.read_text(), re.MULTILINE)
    assert example is not None
    assert list(line) == list(json.loads(example[1]))
    assert line["outcome"] == "finished"
    assert line["tokens_steered"] == receipt["tokens_steered"]
    assert line["directions"] == [
        {key: d[key] for key in ("name", "scale", "digest")} for d in receipt["directions"]
    ]
    assert hashlib.sha256(KEY.encode()).hexdigest().startswith(line["key"])

    before = len(logged(server, "refused"))
    # A reason that no other test uses up: of each, five lines are written in a minute.
    wrong = {"directions": [{"name": "moods/cheerful", "scale": 1e9}]}
    for _ in range(20):
        with pytest.raises(BadRequestError):
            chat(client, PRIVATE, steering=wrong)
    with pytest.raises(BadRequestError):
        chat(client, PRIVATE, model=f"{SERVED_NAME}:cheerful", steering=CALM)
    base = server.url.removesuffix("/v1")
    tokens = {"model": SERVED_NAME, "prompt": PRIVATE, "steering": CALM}
    assert httpx.post(f"{base}/tokenize", json=tokens).status_code == 400
    refused = logged(server, "refused")[before:]
    assert 0 < len([one for one in refused if one["reason"] == "dose"]) <= 5
    assert refused[0]["field"] == "steering.directions.0.scale"
    assert refused[-1] == {
        "reason": "unsupported",
        "field": "steering",
        "route": "/tokenize",
        "key": None,
    }
    text = server.log.read_text()
    assert PRIVATE not in text
    assert KEY not in text
    assert GUEST not in text


def test_the_dashboard_asks_for_what_is_exposed(server: Server, client: OpenAI) -> None:
    read = {"read": [{"name": "moods/cheerful"}], "stop_when": {"read": 0, "above": -1e9}}
    chat(client, TEXTS[0], steering=CALM | read)
    with pytest.raises(BadRequestError):
        chat(client, TEXTS[0], steering={"directions": [{"name": "moods/nobody"}]})
    shown = metrics(server)
    exposed = {name.partition("{")[0] for name in shown}
    dashboard = json.loads(DASHBOARD.read_text())
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            names = re.findall(r"steering:\w+", target["expr"])
            assert names, panel["title"]
            assert set(names) <= exposed, panel["title"]
            (labels,) = re.findall(r"by \((\w+)\)", target["expr"]) or [None]
            series = [name for name in shown if name.partition("{")[0] == names[0]]
            assert labels is None or all(f'{labels}="' in one for one in series), panel["title"]
