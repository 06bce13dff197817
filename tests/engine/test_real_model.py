"""Trained vectors on a real model: the engine's log-probabilities are those of Hugging Face with hooks."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vllm_steer.offline.models.loading import load_config
from vllm_steer.offline.models.prompts import render_question
from vllm_steer.offline.questions.everyday import everyday_questions
from vllm_steer.offline.showcase import shipped_pack
from vllm_steer.packs.pack import SteeringPack, load_pack
from vllm_steer.testing.parity import TOLERANCE
from vllm_steer.verify.compare import Difference, joined, to_reference
from vllm_steer.verify.engine_calls import Answer, answer_batch, fit_memory
from vllm_steer.verify.oracle import Reference
from vllm_steer.verify.process import EngineProcess, ProcessOptions

pytestmark = pytest.mark.engine

TOKENS, TOP = 16, 20
# Spares an engine what it would start or compile beside the model.
ALONE = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
EAGER = ALONE | {"TORCHDYNAMO_DISABLE": "1"}


@pytest.fixture(scope="module")
def pack() -> SteeringPack:
    return load_pack(shipped_pack())


@pytest.fixture(scope="module")
def cases(pack: SteeringPack) -> dict[str, dict[str, Any] | None]:
    """Steerings by three directions, at the strength that was measured and around it."""
    one, two, three = (f"{pack.name}/{name}" for name in ("spiders", "Tokyo", "Dracula"))
    scale = pack.directions["Tokyo"].default_scale
    some = pack.directions["Dracula"].layers[::5]
    return {
        "unsteered": None,
        "as calibrated": {"directions": [{"name": one}]},
        "half again as strong": {"directions": [{"name": two, "scale": 1.5 * scale}]},
        "answer alone": {"directions": [{"name": three, "positions": "generated"}]},
        "prompt and some layers": {
            "directions": [{"name": three, "positions": "prompt", "layers": some}]
        },
        "two at once": {
            "directions": [{"name": one, "strength": 0.5}, {"name": two, "strength": -0.5}]
        },
    }


@pytest.fixture(scope="module")
def prompts(smollm2: Path, cases: dict[str, Any]) -> list[list[int]]:
    """A question for each case."""
    _, tokenizer = load_config(smollm2)
    asked = everyday_questions().heldout[: len(cases)]
    return [list(render_question(tokenizer, question).token_ids) for question in asked]


@pytest.fixture(scope="module")
def reference(smollm2: Path, pack: SteeringPack) -> Reference:
    return Reference(smollm2, [pack])


def answers_of(
    model: Path, pack: SteeringPack, environment: dict[str, str], **arguments: Any
) -> Iterator[EngineProcess]:
    given = {
        "model": str(model),
        "max_num_seqs": 16,
        "kv_cache_memory_bytes": 2**28,
        "block_size": 32,
        "seed": 0,
        "additional_config": {"steering": {"packs": [str(pack.path)]}},
    }
    options = ProcessOptions(prepare=partial(fit_memory, longest=512))
    engine = EngineProcess("the engine", given | arguments, environment, options)
    yield engine
    engine.close()


@pytest.fixture(scope="module", params=["eager", pytest.param("compiled", marks=pytest.mark.slow)])
def exact(
    request: pytest.FixtureRequest, smollm2: Path, pack: SteeringPack
) -> Iterator[EngineProcess]:
    eager = request.param == "eager"
    environment = EAGER if eager else ALONE
    yield from answers_of(smollm2, pack, environment, dtype="float32", enforce_eager=eager)


@pytest.fixture(scope="module")
def half(smollm2: Path, pack: SteeringPack) -> Iterator[EngineProcess]:
    yield from answers_of(smollm2, pack, EAGER, dtype="bfloat16", enforce_eager=True)


def asked(
    engine: EngineProcess, prompts: list[list[int]], steerings: list[dict[str, Any] | None]
) -> list[Answer]:
    """All in one batch."""
    extra = [{"steering": steering} if steering else None for steering in steerings]
    return engine.call(answer_batch, prompts, extra, TOKENS, TOP)


def difference(
    reference: Reference, prompt: list[int], answer: Answer, steering: dict[str, Any] | None
) -> Difference:
    """Of an answer's log-probabilities from the reference's after the same tokens."""
    logprobs = reference.score(prompt, answer.tokens, steering)
    return to_reference(answer, logprobs[len(prompt) - 1 : -1])


def test_equals_hooks(
    exact: EngineProcess,
    prompts: list[list[int]],
    cases: dict[str, dict[str, Any] | None],
    reference: Reference,
) -> None:
    """In float32: the same greedy tokens, and their log-probabilities to 1e-4."""
    answers = asked(exact, prompts, list(cases.values()))
    for (name, steering), prompt, answer in zip(cases.items(), prompts, answers, strict=True):
        found = difference(reference, prompt, answer, steering)
        assert not found.gaps, name
        assert found.largest < TOLERANCE, name
        if steering:
            # What steering does is far more than that.
            assert difference(reference, prompt, answer, None).largest > 1000 * TOLERANCE, name


def test_bfloat16_is_no_worse_for_steering(
    half: EngineProcess,
    prompts: list[list[int]],
    cases: dict[str, dict[str, Any] | None],
    reference: Reference,
) -> None:
    """Held against float32, steered log-probabilities are hardly further off than plain ones."""
    steerings = list(cases.values())[1:]
    plain, steered = (
        joined(
            difference(reference, prompt, answer, steering)
            for prompt, answer, steering in zip(
                prompts[1:], asked(half, prompts[1:], given), given, strict=True
            )
        )
        for given in ([None] * len(steerings), steerings)
    )
    assert plain.mean > 10 * TOLERANCE
    assert steered.mean < 2 * plain.mean
    assert steered.largest < 3 * plain.largest
    assert np.isfinite(steered.values).all()
