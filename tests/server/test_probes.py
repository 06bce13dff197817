"""Thresholds that a pack has, named over HTTP by requests and by a policy's watch."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.server.test_reads import chat
from tests.unit.conftest import layer, probe, threshold
from vllm_steer.offline.demo.server import Server, serve
from vllm_steer.packs.pack import SteeringPack, load_pack, update_records

pytestmark = pytest.mark.server
# An API key whose answers are ended by a threshold of the pack.
MEASURED = "measured"
READ: list[dict[str, Any]] = [{"name": "fears/spiders"}]


@pytest.fixture(scope="module")
def probed(
    model: Path, packs: list[SteeringPack], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("probed")
    fears, *others = packs
    shutil.copytree(fears.path, folder / "fears")
    # Every token is above the one threshold, and none above the other.
    fired = [threshold(0.01, 1e6), threshold(0.05, -1e6)]
    measured = probe(layers=[layer(2, thresholds=fired), layer(3)])
    pack = update_records(load_pack(folder / "fears"), {"spiders": {"probe": measured}})
    watch = {"read": READ, "abort_when": {"read": 0, "at": "fpr=0.05"}}
    digest = hashlib.sha256(MEASURED.encode()).hexdigest()
    (folder / "policy.json").write_text(json.dumps({"watch": {digest: watch}}))
    options = ["--enforce-eager", "--steering-reads", "2"]
    options += ["--steering-policy", str(folder / "policy.json")]
    paths = [each.path for each in (pack, *others)]
    with serve(model, paths, folder / "log", *options) as running:
        yield running


def test_a_rule_names_a_threshold_of_the_pack(probed: Server) -> None:
    body = chat(probed, steering={"read": READ, "stop_when": {"read": 0, "at": "fpr=0.05"}}).json()
    (choice,) = body["choices"]
    assert (choice["finish_reason"], len(choice["token_ids"])) == ("stop", 2)
    # The layer is that of the probe.
    assert body["steering"][0]["reads"][0]["layers"] == [2]
    rare = {"read": READ, "stop_when": {"read": 0, "at": "fpr=0.01"}}
    assert len(chat(probed, steering=rare).json()["choices"][0]["token_ids"]) == 12


def test_a_watch_names_a_threshold_of_the_pack(probed: Server) -> None:
    (choice,) = chat(probed, key=MEASURED).json()["choices"]
    assert (choice["finish_reason"], len(choice["token_ids"])) == ("abort", 2)


@pytest.mark.parametrize(
    ("steering", "message"),
    [
        (
            {"read": READ, "abort_when": {"read": 0, "at": "fpr=0.2"}},
            "there are 'fpr=0.01', 'fpr=0.05'",
        ),
        (
            {"read": [{"name": "moods/gloomy"}], "abort_when": {"read": 0, "at": "fpr=0.01"}},
            "steering.abort_when.at: direction 'moods/gloomy' has no probe",
        ),
    ],
)
def test_thresholds_that_are_not_there_are_400(steering: Any, message: str, probed: Server) -> None:
    refused = chat(probed, steering=steering)
    assert refused.status_code == 400
    assert message in refused.json()["error"]["message"]
