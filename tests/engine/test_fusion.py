"""Fusion Steering through the engine equals Hugging Face with hooks: mu is that of the steered prompt."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from tests.conftest import engine_arguments
from vllm_steer.offline.demo.gold import gold_questions
from vllm_steer.offline.fusion.original import (
    Fusion,
    continue_greedily,
    forced_logs,
    frozen_steered,
)
from vllm_steer.offline.fusion.pack import FusionDeltas, write_deltas
from vllm_steer.offline.fusion.references import References, measure_references
from vllm_steer.offline.fusion.search import Case, Kind, Target, segments_of
from vllm_steer.offline.fusion.steered import steered_deltas
from vllm_steer.offline.models.loading import load_config, load_model, model_identity
from vllm_steer.testing.engine import Engine
from vllm_steer.testing.parity import TOLERANCE

pytestmark = pytest.mark.engine
TOKENS = 24
SCALES: dict[Kind, list[tuple[float, ...]]] = {
    "full": [(0.25,), (0.4,), (1.0,)],
    "segmented": [(0.3, 0.5, 0.1), (0.01, 0.9, 0.4), (0.7, 0.2, 0.6)],
}
LAYERS = 6
CASES = [
    Case(place, kind, 0, segments_of(kind, LAYERS), scales)
    for place, (kind, scales) in enumerate((k, s) for k, tried in SCALES.items() for s in tried)
]
# The first question again, by scales that are equal layer by layer.
SAME = [
    Case(0, "full", 1, segments_of("full", LAYERS), (0.25,)),
    Case(0, "segmented", 1, segments_of("segmented", LAYERS), (0.25,) * 3),
]


@dataclass(frozen=True, eq=False)
class Setting:
    """A model, what was measured on it, and an engine with the pack of it."""

    model: PreTrainedModel
    references: References
    engine: Engine


@pytest.fixture(scope="module")
def setting(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setting]:
    _, tokenizer = load_config(model)
    loaded = load_model(model, "float32", "cpu")
    questions = gold_questions("heldout", 6, prefixed_reference=True)
    found = measure_references(loaded, tokenizer, questions)
    folder = tmp_path_factory.mktemp("fusion")
    cases = [*CASES, *SAME]
    deltas = steered_deltas(loaded, found, cases)
    pack = write_deltas(
        folder,
        "fusion",
        model_identity(model, loaded.config, tokenizer),
        FusionDeltas(questions, cases, deltas, found.residual_norms),
        loaded.dtype,
    )
    engine = Engine(engine_arguments(model, [pack], "eager"), fork=True)
    yield Setting(loaded, found, engine)
    engine.close()


def steering(case: Case) -> Any:
    return Target("", "", "fusion", case).request.steering()


def test_equals_the_delta_of_hugging_face(setting: Setting) -> None:
    """All prompts and kinds in one batch, each with a vector of its own."""
    prompts = setting.references.prompts
    outputs = setting.engine.generate(prompts, [steering(case) for case in CASES], TOKENS)
    answers = set()
    for case, output in zip(CASES, outputs, strict=True):
        prompt = prompts[case.question]
        reference = torch.tensor(setting.references.reference[case.question])
        fusion = Fusion(prompt, reference, torch.tensor(case.layer_scales))
        delta = frozen_steered(setting.model, fusion)
        assert output.tokens == continue_greedily(setting.model, delta, prompt, TOKENS, None)
        expected = forced_logs(setting.model, delta, prompt, output.tokens).numpy()
        assert np.abs(output.logprobs - expected).max() < TOLERANCE
        plain = forced_logs(setting.model, None, prompt, output.tokens).numpy()
        assert np.abs(output.logprobs - plain).max() > 100 * TOLERANCE
        answers.add(tuple(output.tokens))
    assert len(answers) == len(CASES)


def test_equal_scales_are_equal_answers(setting: Setting) -> None:
    """A segment of all layers is the full one."""
    prompt = setting.references.prompts[0]
    asked = [*map(steering, SAME), None]
    one, two, plain = setting.engine.generate([prompt] * 3, asked, TOKENS)
    assert one.tokens == two.tokens != plain.tokens
    assert np.abs(one.logprobs - two.logprobs).max() < TOLERANCE
