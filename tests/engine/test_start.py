"""What an engine checks before it serves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import engine_arguments
from tests.engine_process import EngineProcess
from vllm_steer.pack import SteeringPack

pytestmark = pytest.mark.engine
IN_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}


def test_a_block_that_does_not_steer_stops_the_start(
    model: Path, packs: list[SteeringPack]
) -> None:
    arguments = engine_arguments(model, packs, "eager")
    with pytest.raises(
        RuntimeError, match="added a vector after layer 2 and 8 of 8 tokens did not"
    ):
        EngineProcess(arguments, IN_PROCESS, break_layer=2)


def test_compile_cache_key_holds_the_steering(start: Callable[[str], EngineProcess]) -> None:
    assert start("compiled").config_hash() != start("plain-compiled").config_hash()
