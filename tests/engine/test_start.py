"""What an engine checks before it serves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

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
        EngineProcess(arguments, IN_PROCESS, [break_layer_2])


def break_layer_2() -> None:
    """Leaves the addition of layer 2 without effect, as a dead site would."""
    from vllm_steer.engine import worker

    hook_blocks = worker.hook_blocks

    def without(pairs: Any, bank: Any) -> None:
        hook_blocks([pair for pair in pairs if pair[0] != 2], bank)

    worker.hook_blocks = without


def test_compile_cache_key_holds_the_steering(start: Callable[[str], EngineProcess]) -> None:
    assert start("compiled").config_hash() != start("plain-compiled").config_hash()
