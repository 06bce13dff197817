"""Tensor and pipeline parallel engines give the tokens of one process."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.engine.cases import CASES
from tests.engine_process import EngineProcess
from tests.reference import Reference, assert_equals_hooks

pytestmark = pytest.mark.engine
TOKENS = 16


FEATURES = {"tp2-eager": "tensor parallel", "pp2-eager": "pipeline parallel"}


@pytest.mark.parametrize(
    "kind",
    [pytest.param(k, marks=pytest.mark.feature(f, "exact")) for k, f in FEATURES.items()],
)
def test_parallel_equals_hooks(
    kind: str,
    start: Callable[[str], EngineProcess],
    prompts: list[list[int]],
    reference: Reference,
) -> None:
    outputs = start(kind).generate(prompts, list(CASES.values()), TOKENS)
    assert_equals_hooks(reference, prompts, CASES.values(), outputs, TOKENS)
