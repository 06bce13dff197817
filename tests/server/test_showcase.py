"""The server of the demo on a real model, with the pack that is shipped."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from vllm_steer.offline.demo.server import Server, free_port, running
from vllm_steer.offline.showcase import shipped_pack
from vllm_steer.offline.showcase.ask import Example, ask_all, chosen
from vllm_steer.offline.showcase.run import serve_command
from vllm_steer.packs.pack import load_pack

pytestmark = pytest.mark.server


@pytest.fixture(scope="module")
def showcase(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    port = free_port()
    command = serve_command(smollm2, [shipped_pack()], port)
    with running(command, port, tmp_path_factory.mktemp("showcase") / "log") as server:
        yield server


@pytest.fixture(scope="module")
def examples(showcase: Server) -> list[Example]:
    return ask_all(showcase.url, chosen([load_pack(shipped_pack())], 1))


def test_steered_answers_are_others_than_plain_ones(examples: list[Example]) -> None:
    assert len(examples) == 5
    for example in examples:
        assert example.plain
        assert example.steered
        assert len({example.plain, example.prefixed, example.steered}) == 3, example.asked.direction


def test_receipts_say_strength_and_scale(examples: list[Example]) -> None:
    for example in examples:
        (direction,) = example.receipt["directions"]
        assert direction["name"] == example.asked.direction
        assert direction["strength"] == 1.0
        assert direction["scale"] == pytest.approx(example.asked.record.default_scale)
        assert example.receipt["dose_factor"] == 1.0
        # A strength of 1 is a scale at which text was found fluent.
        assert example.receipt["dose"] <= 1.0 + 1e-6 or example.asked.record.safe_scale is None
        assert example.receipt["tokens_steered"] > 10
