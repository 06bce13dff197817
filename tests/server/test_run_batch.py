"""``vllm run-batch``: files of chat requests are steered as the server's are, with receipts, or refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from vllm_steer.offline.demo.server import SERVED_NAME
from vllm_steer.packs.pack import SteeringPack

pytestmark = pytest.mark.server
VLLM = str(Path(sys.executable).with_name("vllm"))
SAID = [
    {"role": "user", "content": "What are your thoughts on the following statement? Rain is good."}
]
CALM: dict[str, Any] = {"directions": [{"name": "moods/cheerful", "scale": 9.0}]}
LINES: dict[str, dict[str, Any]] = {
    "plain": {"steering": "none"},
    "default": {},
    "object": {"steering": CALM},
    "alias": {"model": f"{SERVED_NAME}:cheerful"},
    "both": {"model": f"{SERVED_NAME}:cheerful", "steering": CALM},
    "unknown alias": {"model": f"{SERVED_NAME}:glad"},
    "unknown direction": {"steering": {"directions": [{"name": "moods/glad"}]}},
}


@pytest.fixture(scope="module")
def answers(
    model: Path, packs: list[SteeringPack], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Any]]:
    """The output line of each, from one row for all steered ones, who wait longer than a client would."""
    folder = tmp_path_factory.mktemp("batch")
    policy = {
        "aliases": {"cheerful": CALM},
        "default": {"directions": [{"name": "moods/gloomy", "scale": 2.0}]},
    }
    (folder / "policy.json").write_text(json.dumps(policy))
    asked = [
        {"custom_id": name, "method": "POST", "url": "/v1/chat/completions"}
        | {
            "body": {"model": SERVED_NAME, "messages": SAID, "max_tokens": 12, "temperature": 0.0}
            | fields
        }
        for name, fields in LINES.items()
    ]
    (folder / "in.jsonl").write_text("\n".join(map(json.dumps, asked)))
    done = subprocess.run(
        [VLLM, "run-batch", "-i", folder / "in.jsonl", "-o", folder / "out.jsonl",
         "--model", model, "--served-model-name", SERVED_NAME, "--max-model-len", "256",
         "--max-num-seqs", "1", "--dtype", "float32", "--kv-cache-memory-bytes", "67108864", "--enforce-eager",
         "--enable-steering",
         "--steering-packs", *(pack.path for pack in packs), "--steering-policy", folder / "policy.json",
         "--steering-rows", "2", "--steering-wait-seconds", "0.001"],
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]
    return {line["custom_id"]: line for line in lines}


def text_of(line: dict[str, Any]) -> str:
    return str(line["response"]["body"]["choices"][0]["message"]["content"])


@pytest.mark.parametrize(
    ("name", "direction"),
    [("object", "moods/cheerful"), ("alias", "moods/cheerful"), ("default", "moods/gloomy")],
)
def test_a_line_is_steered_with_a_receipt(
    answers: dict[str, dict[str, Any]], name: str, direction: str
) -> None:
    (receipt,) = answers[name]["response"]["body"]["steering"]
    assert [each["name"] for each in receipt["directions"]] == [direction]
    assert receipt["tokens_steered"] > 0
    if name != "default":
        assert text_of(answers[name]) != text_of(answers["plain"])


def test_an_alias_does_as_its_steering(answers: dict[str, dict[str, Any]]) -> None:
    assert text_of(answers["alias"]) == text_of(answers["object"])


def test_an_unsteered_line_has_no_receipt(answers: dict[str, dict[str, Any]]) -> None:
    assert answers["plain"]["response"]["status_code"] == 200
    assert "steering" not in answers["plain"]["response"]["body"]


@pytest.mark.parametrize(
    ("name", "code", "message"),
    [
        ("both", 400, "remove 'steering' or use the model"),
        ("unknown alias", 404, "does not exist"),
        ("unknown direction", 400, "has no direction"),
    ],
)
def test_a_line_that_cannot_be_steered_is_refused(
    answers: dict[str, dict[str, Any]], name: str, code: int, message: str
) -> None:
    line = answers[name]
    assert line["response"]["status_code"] == code
    assert line["response"]["body"] is None
    assert message in json.dumps(line["error"])
