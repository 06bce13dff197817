"""Tensor and pipeline parallel engines give the tokens of one process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import engine_arguments
from tests.engine.cases import CASES
from vllm_steer.errors import EngineError
from vllm_steer.packs.pack import SteeringPack
from vllm_steer.testing.engine import Engine
from vllm_steer.testing.parity import assert_equals_hooks
from vllm_steer.verify.oracle import Reference

pytestmark = pytest.mark.engine
TOKENS = 16


FEATURES = {"tp2-eager": "tensor parallel", "pp2-eager": "pipeline parallel"}


@pytest.mark.parametrize(
    "kind",
    [pytest.param(k, marks=pytest.mark.feature(f, "exact")) for k, f in FEATURES.items()],
)
def test_parallel_equals_hooks(
    kind: str,
    start: Callable[[str], Engine],
    prompts: list[list[int]],
    reference: Reference,
) -> None:
    outputs = start(kind).generate(prompts, list(CASES.values()), TOKENS)
    assert_equals_hooks(reference, prompts, CASES.values(), outputs, TOKENS)


@pytest.mark.feature("Ray executor", "not on CPU: refused by vLLM itself")
def test_vllm_has_no_ray_executor_for_cpu(model: Path, packs: list[SteeringPack]) -> None:
    """Should a later vLLM have one, this fails and the tests above have to run on it."""
    arguments = engine_arguments(model, packs, "tp2-ray-eager")
    with pytest.raises(EngineError, match="platform cpu does not support ray"):
        Engine(arguments, {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"})
