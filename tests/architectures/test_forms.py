"""The affine form and scores read the true residual stream on every family, or the engine does not start."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.architectures.checkpoint import write_checkpoint
from tests.architectures.families import FAMILIES, VOCABULARY, Family
from tests.architectures.parity import FIRST, SECOND, TOLERANCE, engine_arguments
from vllm_steer.errors import EngineError
from vllm_steer.testing.engine import Engine
from vllm_steer.verify.oracle import Reference

pytestmark = pytest.mark.engine
TOKENS = 6
# One family of each form of block output: hidden states with a residual, with one that nobody reads, alone.
QUICK = ("Llama", "Cohere", "GPT-2")
CASES: list[dict[str, Any] | None] = [
    None,
    {"directions": [{"name": FIRST, "op": "ablate", "scale": 2.0}]},
    {"directions": [{"name": FIRST, "op": "rotate", "plane": SECOND, "scale": 90.0}]},
    {"directions": [{"name": SECOND, "op": "clamp", "scale": 4.0}]},
    {"directions": [{"name": FIRST, "scale": 6.0, "restore_norm": True}]},
]
READS: list[dict[str, Any]] = [
    {"name": FIRST, "at": "all"},
    {"name": SECOND, "at": "all", "layers": [0]},
    {"name": SECOND, "at": "all", "when": "after"},
]


def arguments(root: Path) -> dict[str, Any]:
    given = engine_arguments(root, "eager")
    given["additional_config"]["steering"] |= {"ops": "affine", "reads": 3}
    return given


@dataclass(frozen=True)
class Affine:
    """A family's checkpoint, the reference of it, and an engine of the affine form that reads."""

    family: Family
    root: Path
    reference: Reference
    engine: Engine


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(family, id=name, marks=[pytest.mark.slow] * (name not in QUICK))
        for name, family in FAMILIES.items()
    ],
)
def affine(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Affine]:
    root = tmp_path_factory.mktemp("family")
    pack = write_checkpoint(request.param, root)
    engine = Engine(arguments(root) | request.param.engine, fork=True)
    yield Affine(request.param, root, Reference(root, [pack]), engine)
    engine.close()


def test_forms_equal_hooks(affine: Affine) -> None:
    generator, reference = np.random.default_rng(3), affine.reference
    prompts = [generator.integers(3, VOCABULARY, 20 + 6 * n).tolist() for n in range(len(CASES))]
    outputs = affine.engine.generate(prompts, CASES, TOKENS)
    for prompt, steering, output in zip(prompts, CASES, outputs, strict=True):
        expected = reference.generate(prompt, steering, TOKENS)
        assert output.tokens == expected.tokens, steering
        assert np.abs(output.logprobs - expected.logprobs).max() < TOLERANCE, steering
        if steering is not None:
            plain = reference.generate(prompt, None, TOKENS)
            assert np.abs(plain.logprobs - expected.logprobs).max() > 100 * TOLERANCE, steering


def assert_scores_equal_hooks(engine: Engine, reference: Reference) -> None:
    steerings = [{"read": READS}, {"directions": [{"name": FIRST, "scale": 6.0}], "read": READS}]
    generator = np.random.default_rng(4)
    prompts = [generator.integers(3, VOCABULARY, 20 + 6 * n).tolist() for n in range(2)]
    outputs = engine.generate(prompts, steerings, TOKENS)
    for prompt, steering, output in zip(prompts, steerings, outputs, strict=True):
        expected = reference.read(prompt, output.tokens, steering)[:, :-1]
        assert output.scores is not None
        assert np.abs(output.scores[:, :-1] - expected).max() < TOLERANCE, steering


def test_scores_equal_hooks(affine: Affine) -> None:
    assert_scores_equal_hooks(affine.engine, affine.reference)


def test_scores_of_an_additive_engine_equal_hooks(affine: Affine) -> None:
    given = arguments(affine.root) | affine.family.engine
    given["additional_config"]["steering"]["ops"] = "additive"
    engine = Engine(given, fork=True)
    try:
        assert_scores_equal_hooks(engine, affine.reference)
    finally:
        engine.close()


def _read_every_residual() -> None:
    """A build that does not know which blocks return a residual that nobody reads."""
    from vllm_steer.engine import affine

    affine.UNREAD_RESIDUALS = ()


def _read_no_residual() -> None:
    """A build that takes hidden states for the whole stream."""
    from vllm_steer.engine import affine

    affine.UNREAD_RESIDUALS = ("CohereDecoderLayer", "LlamaDecoderLayer")


@pytest.mark.parametrize(
    ("name", "fault"), [("Cohere", _read_every_residual), ("Llama", _read_no_residual)]
)
def test_a_stream_that_is_read_wrongly_stops_the_start(
    name: str, fault: Any, tmp_path: Path
) -> None:
    write_checkpoint(FAMILIES[name], tmp_path)
    with pytest.raises(
        EngineError,
        match="CompatibilityError: the steering self-test cannot identify the residual stream after layer 0",
    ):
        Engine(arguments(tmp_path), prepare=[fault], fork=True)
