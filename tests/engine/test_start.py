"""What an engine checks before it serves."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import engine_arguments
from vllm_steer.engine.row_values import ALWAYS
from vllm_steer.errors import EngineError
from vllm_steer.packs.pack import VECTORS_FILE, SteeringPack
from vllm_steer.testing.engine import Engine

pytestmark = pytest.mark.engine
IN_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}


@pytest.fixture(scope="module")
def failed_start(
    model: Path, packs: list[SteeringPack], tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, int]:
    """Error of an engine whose layer 2 does not steer, and how often it opened files of vectors."""
    reads = tmp_path_factory.mktemp("start") / "reads"
    arguments = engine_arguments(model, packs, "eager")
    with pytest.raises(EngineError) as failure:
        Engine(arguments, IN_PROCESS, [break_layer_2, partial(count_reads, reads)])
    return str(failure.value), reads.stat().st_size


def test_a_block_that_does_not_steer_stops_the_start(failed_start: tuple[str, int]) -> None:
    assert "added a vector after layer 2 and 8 of 8 tokens did not" in failed_start[0]


def test_a_process_reads_each_pack_once(
    failed_start: tuple[str, int], packs: list[SteeringPack]
) -> None:
    """Configuration, admission and worker, all in this process, share what the first has read."""
    assert failed_start[1] == len(packs)


def ignore_gates() -> None:
    """Lets components act whether or not their probe fires."""
    from vllm_steer.engine import affine

    original = affine.affine_change

    def always(block: Any, *args: Any) -> Any:
        getattr(block, affine.NUMBERS_BUFFER)[..., affine.THRESHOLD, :] = ALWAYS
        return original(block, *args)

    affine.affine_change = always


def ignore_components() -> None:
    from vllm_steer.engine import affine

    affine.affine_change = lambda block, stream, rows, factors: stream * 0.0


def ignore_stream() -> None:
    from vllm_steer.engine import affine

    original = affine.affine_change
    affine.affine_change = lambda block, stream, *rest: original(block, stream * 0.0, *rest)


def ignore_factors() -> None:
    from vllm_steer.engine import affine

    original = affine.factors_of
    affine.factors_of = lambda block, hidden: torch.ones_like(original(block, hidden))


def ignore_restore() -> None:
    from vllm_steer.engine import affine

    affine.restored = lambda block, stream, change, rows: change


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (ignore_components, "moved components after layer 1 and 8 of 8 tokens did not"),
        pytest.param(
            ignore_stream, "read components after layer 2 and 8 of 8", marks=pytest.mark.slow
        ),
        (ignore_restore, "restored a length after layer 1 and 8 of 8 tokens did not"),
        pytest.param(
            ignore_factors,
            "gave a change the factor 0 after layer 1 and the output",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ignore_gates, "closed a gate after layer 1 and the output", marks=pytest.mark.slow
        ),
    ],
)
def test_a_form_that_does_not_reach_the_graph_stops_the_start(
    fault: Callable[[], None], message: str, model: Path, packs: list[SteeringPack]
) -> None:
    arguments = engine_arguments(model, packs, "eager-affine")
    with pytest.raises(EngineError, match=message):
        Engine(arguments, IN_PROCESS, [fault])


def break_layer_2() -> None:
    """Leaves the addition of layer 2 without effect, as a dead site would."""
    from vllm_steer.engine import worker

    hook_blocks = worker.hook_blocks

    def without(pairs: Any, *banks: Any) -> None:
        hook_blocks([pair for pair in pairs if pair[0] != 2], *banks)

    worker.hook_blocks = without


def count_reads(counter: Path) -> None:
    """Adds a byte to a file whenever this process opens a pack's vectors."""
    descriptor = os.open(counter, os.O_CREAT | os.O_WRONLY | os.O_APPEND)

    def count(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and str(arguments[0]).endswith(VECTORS_FILE):
            os.write(descriptor, b".")

    sys.addaudithook(count)


def test_compile_cache_key_holds_the_steering(start: Callable[[str], Engine]) -> None:
    assert start("compiled").config_hash() != start("plain-compiled").config_hash()
