"""A real ``vllm serve`` and the OpenAI client: every form of request, and every refusal."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest
from openai import AsyncOpenAI, OpenAI

from vllm_steer.offline.demo.corpus import user_text
from vllm_steer.offline.demo.server import SERVED_NAME, Server
from vllm_steer.offline.questions.statements import statements

pytestmark = pytest.mark.server
TEXTS = [user_text(statement.text) for statement in statements("heldout")[:4]]
STEERING: dict[str, Any] = {"directions": [{"name": "moods/cheerful", "scale": 12.0}]}
FLAT: dict[str, Any] = {"steer": ["moods/cheerful:12"]}


@pytest.fixture(scope="module")
def client(server: Server) -> OpenAI:
    return OpenAI(base_url=server.url, api_key="none", max_retries=0)


def chat(client: OpenAI, text: str, **extra_body: Any) -> str:
    response = client.chat.completions.create(
        model=SERVED_NAME,
        messages=[{"role": "user", "content": text}],
        max_tokens=32,
        temperature=0.0,
        extra_body=extra_body,
    )
    return response.choices[0].message.content or ""


def complete(client: OpenAI, text: str, **extra_body: Any) -> str:
    response = client.completions.create(
        model=SERVED_NAME, prompt=text, max_tokens=32, temperature=0.0, extra_body=extra_body
    )
    return response.choices[0].text


@pytest.mark.parametrize("ask", [chat, complete])
def test_the_forms_agree(ask: Any, client: OpenAI) -> None:
    steered = ask(client, TEXTS[0], steering=STEERING)
    assert steered != ask(client, TEXTS[0])
    assert steered == ask(client, TEXTS[0], vllm_xargs={"steering": json.dumps(STEERING)})
    assert steered == ask(client, TEXTS[0], vllm_xargs=FLAT)
    assert steered == ask(client, TEXTS[0], **FLAT)


def test_responses_route(client: OpenAI) -> None:
    def respond(**extra_body: Any) -> str:
        return client.responses.create(
            model=SERVED_NAME,
            input=TEXTS[0],
            max_output_tokens=32,
            temperature=0.0,
            extra_body=extra_body,
        ).output_text

    assert respond(steering=STEERING) == chat(client, TEXTS[0], steering=STEERING)
    assert respond() == chat(client, TEXTS[0])


def test_streaming_equals_not_streaming(client: OpenAI) -> None:
    stream = client.chat.completions.create(
        model=SERVED_NAME,
        messages=[{"role": "user", "content": TEXTS[1]}],
        max_tokens=32,
        temperature=0.0,
        stream=True,
        extra_body={"steering": STEERING},
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert text == chat(client, TEXTS[1], steering=STEERING)


def test_eight_concurrent_requests_get_what_they_get_alone(client: OpenAI, server: Server) -> None:
    names = ("fears/spiders", "fears/heights", "moods/cheerful", "moods/gloomy")
    wanted: list[tuple[str, dict[str, Any] | None]] = [
        (
            TEXTS[index % 4],
            None if index == 3 else {"directions": [{"name": name, "scale": 6.0 + index}]},
        )
        for index, name in enumerate(names * 2)
    ]

    async def together() -> list[str]:
        async with AsyncOpenAI(base_url=server.url, api_key="none", max_retries=0) as many:
            responses = await asyncio.gather(
                *(
                    many.chat.completions.create(
                        model=SERVED_NAME,
                        messages=[{"role": "user", "content": text}],
                        max_tokens=32,
                        temperature=0.0,
                        extra_body={"steering": steering} if steering else {},
                    )
                    for text, steering in wanted
                )
            )
        return [response.choices[0].message.content or "" for response in responses]

    alone = [chat(client, text, **({"steering": s} if s else {})) for text, s in wanted]
    assert asyncio.run(together()) == alone


def test_several_choices_are_all_steered(client: OpenAI) -> None:
    response = client.chat.completions.create(
        model=SERVED_NAME,
        messages=[{"role": "user", "content": TEXTS[0]}],
        max_tokens=32,
        temperature=1e-5,
        seed=0,
        n=3,
        extra_body={"steering": STEERING},
    )
    expected = chat(client, TEXTS[0], steering=STEERING)
    assert [choice.message.content for choice in response.choices] == [expected] * 3


BAD: list[tuple[dict[str, Any], str]] = [
    (
        {"steering": {"directions": [{"name": "nofears/spiders"}]}},
        "no steering pack 'nofears' is loaded",
    ),
    ({"steering": {"directions": [{"name": "fears/spider"}]}}, "did you mean 'spiders'?"),
    (
        {"steering": {"directions": [{"name": "fears/spiders", "layers": [0]}]}},
        "no vector for layers [0]; it has 1-",
    ),
    (
        {"steering": {"directions": [{"name": "fears/spiders", "layers": [99]}]}},
        "no vector for layers [99]",
    ),
    (
        {"steering": {"directions": [{"name": "fears/spiders", "scale": "high"}]}},
        "0.scale:",
    ),
    (
        {"steering": {"directions": [{"name": "fears/spiders", "scale": 1e30}]}},
        "|scale| must be at most",
    ),
    (
        {"steering": {"directions": [{"name": "fears/spiders", "power": 1}]}},
        "power: unknown key",
    ),
    (
        {"steering": {"directions": [{"name": "fears/spiders", "strength": 1}]}},
        "0.strength: direction 'fears/spiders' is not calibrated; give scale",
    ),
    (
        {"steering": {"directions": [{"name": "fears/spiders", "strength": 1, "scale": 2}]}},
        "0: give either scale or strength",
    ),
    (
        {"steering": {"directions": [{"name": "fears/spiders"}], "position": "all"}},
        "did you mean 'positions'?",
    ),
    (
        {"steering": {"directions": [{"name": "fears/spiders", "positions": "last"}]}},
        "must be 'all', 'prompt', 'generated', 'last_prompt' or a list",
    ),
    (
        {"steering": {**STEERING, "positions": [[-500, None]]}},
        "[-500, null] starts before the prompt",
    ),
    ({"steering": {**STEERING, "positions": [[5000, None]]}}, "is never reached"),
    (
        {"vllm_xargs": {"steer": ["fears/spiders:3"], "steer_positions": ["4"]}},
        'a list of "start:end"',
    ),
    ({"steering": {"directions": []}}, "needs directions to steer"),
    ({"steering": "spiders"}, "steering:"),
    ({"steering": [1]}, "steering must be an object such as"),
    ({"steerring": STEERING}, "unknown steering argument 'steerring'; did you mean 'steering'?"),
    ({"vllm_xargs": {"steer": ["fears/spiders:much"]}}, "with a number after the colon"),
    ({"vllm_xargs": {"steer_positions": "all"}}, "steer must be a list"),
    ({"vllm_xargs": {"steering": "{}"}, "steering": STEERING}, "send it once"),
    ({"vllm_xargs": FLAT, "steering": STEERING}, "send either 'steering' or 'steer"),
    ({"vllm_xargs": {"_vllm_steer_plan": [1]}}, "is internal"),
    ({"steering": STEERING, "use_beam_search": True, "n": 2}, "does not support beam search"),
]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streaming"])
@pytest.mark.parametrize(("body", "message"), BAD, ids=[message for _, message in BAD])
def test_bad_requests_get_400_and_the_server_goes_on(
    body: dict[str, Any], message: str, stream: bool, server: Server
) -> None:
    common = {"model": SERVED_NAME, "max_tokens": 8, "temperature": 0.0}
    if stream and "use_beam_search" in body:
        pytest.skip("vLLM refuses to stream a beam search before it looks at anything else")
    for route, prompt in (
        ("chat/completions", {"messages": [{"role": "user", "content": TEXTS[0]}]}),
        ("completions", {"prompt": TEXTS[0]}),
    ):
        answer = httpx.post(
            f"{server.url}/{route}", json={**common, **prompt, "stream": stream, **body}, timeout=60
        )
        assert answer.status_code == 400
        assert message in answer.json()["error"]["message"]
        good = httpx.post(f"{server.url}/{route}", json={**common, **prompt}, timeout=60)
        assert good.status_code == 200


def test_nan_is_refused(server: Server) -> None:
    body = json.dumps({"model": SERVED_NAME, "prompt": "a", "steering": STEERING}).replace(
        "12.0", "NaN"
    )
    answer = httpx.post(
        f"{server.url}/completions", content=body, headers={"content-type": "application/json"}
    )
    assert answer.status_code == 400
    assert "finite number" in answer.json()["error"]["message"]


def test_routes_that_would_drop_steering_refuse_it(server: Server) -> None:
    body = {"model": SERVED_NAME, "max_tokens": 8, "messages": [{"role": "user", "content": "a"}]}
    answer = httpx.post(f"{server.url}/messages", json=body | {"steering": STEERING}, timeout=60)
    assert answer.status_code == 400
    assert "does not support the field 'steering'" in answer.json()["error"]["message"]
    assert httpx.post(f"{server.url}/messages", json=body, timeout=60).status_code == 200


def test_xargs_steer_or_are_refused(server: Server) -> None:
    from vllm.entrypoints.anthropic.protocol import AnthropicMessagesRequest

    body: dict[str, Any] = {"model": SERVED_NAME, "max_tokens": 8, "temperature": 0.0}
    body["messages"] = [{"role": "user", "content": "a"}]
    plain = httpx.post(f"{server.url}/messages", json=body, timeout=60)
    steered = httpx.post(f"{server.url}/messages", json=body | {"vllm_xargs": FLAT}, timeout=60)
    if "vllm_xargs" in AnthropicMessagesRequest.model_fields:
        assert plain.json()["content"] != steered.json()["content"]
    else:
        assert steered.status_code == 400
        assert "does not support the field 'vllm_xargs'" in steered.json()["error"]["message"]
    batch = body | {"messages": [body["messages"]], "vllm_xargs": FLAT}
    refused = httpx.post(f"{server.url}/chat/completions/batch", json=batch, timeout=60)
    assert refused.status_code == 400
    assert "does not support the field 'vllm_xargs'" in refused.json()["error"]["message"]
    del batch["vllm_xargs"]
    answer = httpx.post(f"{server.url}/chat/completions/batch", json=batch, timeout=60)
    assert answer.status_code == 200
