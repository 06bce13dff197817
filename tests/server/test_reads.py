"""Scores over HTTP: in bodies, chunks and receipts of a real ``vllm serve``, and probes that end answers."""

from __future__ import annotations

import json
from typing import Any

import httpx
import numpy as np
import pytest

from tests.conftest import FIRES, WATCHED
from vllm_steer.offline.demo.corpus import user_text
from vllm_steer.offline.demo.server import SERVED_NAME, Server
from vllm_steer.offline.questions.statements import statements
from vllm_steer.verify.oracle import Reference

pytestmark = pytest.mark.server
TOLERANCE = 1e-4
TEXT = user_text(statements("heldout")[0].text)
READ: list[dict[str, Any]] = [
    {"name": "moods/cheerful", "at": "all"},
    {"name": "fears/spiders", "layers": [2], "when": "after"},
]
NAMES = ("fears/spiders", "moods/gloomy")
STEERING: dict[str, Any] = {"directions": [{"name": "moods/cheerful", "scale": 8.0}], "read": READ}


def ask(server: Server, route: str, key: str = "none", **fields: Any) -> httpx.Response:
    body = {"model": SERVED_NAME, "max_tokens": 12, "temperature": 0.0, "ignore_eos": True}
    headers = {"authorization": f"Bearer {key}"}
    return httpx.post(f"{server.url}/{route}", json=body | fields, headers=headers, timeout=120)


def chat(server: Server, **fields: Any) -> httpx.Response:
    messages = [{"role": "user", "content": TEXT}]
    given = {"messages": messages, "return_token_ids": True}
    return ask(server, "chat/completions", **given | fields)


def test_the_body_has_the_scores_of_its_tokens(server: Server, reference: Reference) -> None:
    body = chat(server, steering=STEERING | {"recompute": True}).json()
    prompt, tokens = body["prompt_token_ids"], body["choices"][0]["token_ids"]
    expected = reference.read(prompt, tokens, STEERING)
    (receipt,) = body["steering"]
    first, second = receipt["reads"]
    assert [first["name"], second["name"]] == ["moods/cheerful", "fears/spiders"]
    assert (second["layers"], second["when"]) == ([2], "after")
    (answer,) = first["answers"]
    assert np.allclose(answer["prompt"], expected[0, : len(prompt)], atol=TOLERANCE)
    # The last token went through no model.
    assert answer["generated"].pop() is None
    generated = expected[0, len(prompt) : -1]
    assert np.allclose(answer["generated"], generated, atol=TOLERANCE)
    assert np.allclose([answer["mean"], answer["max"]], [generated.mean(), generated.max()])
    assert "prompt" not in second["answers"][0]
    found = second["answers"][0]["generated"][:-1]
    assert np.allclose(found, expected[1, len(prompt) : -1], atol=TOLERANCE)


@pytest.mark.parametrize("route", ["chat", "completions"])
def test_every_chunk_of_a_stream_has_those_that_came(route: str, server: Server) -> None:
    fields: dict[str, Any] = {"steering": STEERING, "stream": True, "n": 2, "temperature": 1.0}
    if route == "chat":
        text = chat(server, **fields).text
    else:
        text = ask(server, "completions", prompt=TEXT, **fields).text
    lines = [line.removeprefix("data: ") for line in text.split("\n\n")]
    chunks = [json.loads(line) for line in lines if line.startswith("{")]
    final: dict[int, Any] = {}
    streamed: dict[int, list[list[Any]]] = {0: [[], []], 1: [[], []]}
    counts = [0, 0]
    for chunk in chunks:
        for part in chunk.get("steering_scores", ()):
            own = streamed[part["index"]]
            assert part["start"] == len(own[0])
            for row, more in zip(own, part["scores"], strict=True):
                row += more
            counts[part["index"]] += 1
        if "steering" in chunk:
            final[chunk["choices"][0]["index"]] = chunk["steering"][0]["reads"]
    # They came bit by bit, and are those of the receipt but for the last token, which has none.
    assert min(counts) > 5
    assert set(final) == {0, 1}
    for index, reads in final.items():
        (answer,) = reads[0]["answers"]
        assert answer["prompt"] + answer["generated"] == [*streamed[index][0], None]
        assert (
            reads[1]["answers"][0]["generated"][:-1] == streamed[index][1][len(answer["prompt"]) :]
        )


def test_the_responses_route_has_them(server: Server) -> None:
    fields = {"input": TEXT, "max_output_tokens": 12, "temperature": 0.0}
    answer = ask(server, "responses", steering={"read": READ}, **fields).json()
    (receipt,) = answer["steering"]
    assert receipt["directions"] == []
    assert receipt["tokens_steered"] == 0
    scores = receipt["reads"][0]["answers"][0]["generated"]
    assert sum(score is not None for score in scores) == len(scores) - 1


@pytest.mark.parametrize(("field", "reason"), [("stop_when", "stop"), ("abort_when", "abort")])
def test_a_probe_ends_the_answer_and_is_named(field: str, reason: str, server: Server) -> None:
    body = chat(server, steering=STEERING | {field: FIRES | {"read": 1}}).json()
    (choice,) = body["choices"]
    assert choice["finish_reason"] == reason
    assert choice["stop_reason"] == "fears/spiders above -1e+06"
    assert len(choice["token_ids"]) == 4


@pytest.mark.parametrize("steering", [None, "none", STEERING])
@pytest.mark.parametrize("stream", [False, True])
def test_an_operator_guards_every_request_of_a_key(
    stream: bool, steering: Any, server: Server
) -> None:
    fields = {} if steering is None else {"steering": steering}
    answered = chat(server, key=WATCHED, stream=stream, **fields)
    if stream:
        lines = [line.removeprefix("data: ") for line in answered.text.split("\n\n")]
        chunks = [json.loads(line) for line in lines if line.startswith("{")]
        body = next(c for c in reversed(chunks) if c["choices"])
        scores = [part for c in chunks for part in c.get("steering_scores", ())]
        assert {len(part["scores"]) for part in scores} == ({2} if steering == STEERING else set())
    else:
        body = answered.json()
        assert len(body["choices"][0]["token_ids"]) == 4
    (choice,) = body["choices"]
    assert choice["finish_reason"] == "abort"
    assert choice["stop_reason"] == "fears/heights above -1e+06"
    # Its client sees scores of its own reads alone, and no receipt where it asked for nothing.
    assert ("steering" in body) == ("x-steering" in answered.headers) == (steering == STEERING)
    if steering == STEERING:
        assert len(body["steering"][0]["reads"]) == 2
    # Other keys are not guarded.
    assert len(chat(server, **fields).json()["choices"][0]["token_ids"]) == 12


def test_ended_answers_and_scores_are_counted(server: Server) -> None:
    def count(name: str) -> float:
        text = httpx.get(f"{server.url.removesuffix('/v1')}/metrics").text
        lines = [line for line in text.splitlines() if line.startswith(name)]
        return sum(float(line.rpartition(" ")[2]) for line in lines)

    names = 'steering:stopped_total{action="abort"}', "steering:read_score_count"
    before = [count(name) for name in names]
    chat(server, key=WATCHED)
    assert [count(name) - earlier for name, earlier in zip(names, before, strict=True)] == [1, 1]


def test_beam_search_is_refused_where_it_could_not_be_guarded(server: Server) -> None:
    refused = chat(server, key=WATCHED, use_beam_search=True, n=2)
    assert refused.status_code == 400
    assert "beam search" in refused.json()["error"]["message"]


@pytest.mark.parametrize(
    ("steering", "message"),
    [
        ({"read": [{"name": "fears/snakes"}]}, "steering.read.0.name"),
        ({"read": [{"name": "fears/spiders", "layers": [99]}]}, "no vector for layers [99]"),
        (
            {"read": [{"name": n, "when": w} for n in NAMES for w in ("before", "after")]},
            "4 distinct probes are named, and the limit is 3",
        ),
        (
            {"read": READ, "abort_when": {"read": 9, "above": 1.0}},
            "abort_when.read: there is no read with index 9",
        ),
    ],
)
def test_what_cannot_be_read_is_400(steering: Any, message: str, server: Server) -> None:
    refused = chat(server, steering=steering)
    assert refused.status_code == 400
    assert message in refused.json()["error"]["message"]
