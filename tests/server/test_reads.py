"""Scores over HTTP: in bodies, chunks and receipts of a real ``vllm serve``, and probes that end answers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from vllm_steer.offline.demo.corpus import user_text
from vllm_steer.offline.demo.server import SERVED_NAME, Server, serve
from vllm_steer.offline.questions.statements import statements
from vllm_steer.packs.pack import SteeringPack
from vllm_steer.verify.oracle import Reference

pytestmark = pytest.mark.server
TOLERANCE = 1e-4
TEXT = user_text(statements("heldout")[0].text)
READ: list[dict[str, Any]] = [
    {"name": "moods/cheerful", "at": "all"},
    {"name": "fears/spiders", "layers": [2], "when": "after"},
]
STEERING: dict[str, Any] = {"directions": [{"name": "moods/cheerful", "scale": 8.0}], "read": READ}


@pytest.fixture(scope="module")
def reading(
    model: Path, packs: list[SteeringPack], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("reading") / "log"
    options = ["--enforce-eager", "--steering-reads", "2"]
    with serve(model, [pack.path for pack in packs], log, *options) as running:
        yield running


def ask(server: Server, route: str, **fields: Any) -> httpx.Response:
    body = {"model": SERVED_NAME, "max_tokens": 12, "temperature": 0.0, "ignore_eos": True}
    return httpx.post(f"{server.url}/{route}", json=body | fields, timeout=120)


def chat(server: Server, **fields: Any) -> httpx.Response:
    messages = [{"role": "user", "content": TEXT}]
    given = {"messages": messages, "return_token_ids": True}
    return ask(server, "chat/completions", **given | fields)


def test_the_body_has_the_scores_of_its_tokens(reading: Server, reference: Reference) -> None:
    body = chat(reading, steering=STEERING | {"recompute": True}).json()
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
def test_every_chunk_of_a_stream_has_those_that_came(route: str, reading: Server) -> None:
    fields: dict[str, Any] = {"steering": STEERING, "stream": True, "n": 2}
    if route == "chat":
        text = chat(reading, **fields).text
    else:
        text = ask(reading, "completions", prompt=TEXT, **fields).text
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
    for index, reads in final.items():
        (answer,) = reads[0]["answers"]
        assert answer["prompt"] + answer["generated"] == [*streamed[index][0], None]
        assert (
            reads[1]["answers"][0]["generated"][:-1] == streamed[index][1][len(answer["prompt"]) :]
        )


def test_the_responses_route_has_them(reading: Server) -> None:
    fields = {"input": TEXT, "max_output_tokens": 12, "temperature": 0.0}
    answer = ask(reading, "responses", steering={"read": READ}, **fields).json()
    (receipt,) = answer["steering"]
    assert receipt["directions"] == []
    assert receipt["tokens_steered"] == 0
    scores = receipt["reads"][0]["answers"][0]["generated"]
    assert sum(score is not None for score in scores) == len(scores) - 1


@pytest.mark.parametrize(("field", "reason"), [("stop_when", "stop"), ("abort_when", "abort")])
def test_a_probe_ends_the_answer_and_is_named(field: str, reason: str, reading: Server) -> None:
    rule = {"read": 1, "above": -1e6, "for": 3}
    body = chat(reading, steering=STEERING | {field: rule}).json()
    (choice,) = body["choices"]
    assert choice["finish_reason"] == reason
    assert choice["stop_reason"] == "fears/spiders above -1e+06"
    assert len(choice["token_ids"]) == 4


@pytest.mark.parametrize(
    ("steering", "message"),
    [
        ({"read": [{"name": "fears/snakes"}]}, "steering.read.0.name"),
        ({"read": [{"name": "fears/spiders", "layers": [99]}]}, "no vector for layers [99]"),
        (
            {"read": [{"name": n} for n in ("fears/spiders", "fears/heights", "moods/gloomy")]},
            "room for 2 per request",
        ),
        (
            {"read": READ, "abort_when": {"read": 9, "above": 1.0}},
            "abort_when.read: 9 is the index of no read",
        ),
    ],
)
def test_what_cannot_be_read_is_400(steering: Any, message: str, reading: Server) -> None:
    refused = chat(reading, steering=steering)
    assert refused.status_code == 400
    assert message in refused.json()["error"]["message"]


def test_a_server_without_reads_names_the_flag(server: Server) -> None:
    refused = chat(server, steering={"read": READ})
    assert refused.status_code == 400
    assert "--steering-reads" in refused.json()["error"]["message"]
