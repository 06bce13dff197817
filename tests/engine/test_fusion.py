"""Fusion Steering through the engine equals Hugging Face with hooks that add the same frozen delta."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from offline.demo.gold import gold_questions
from offline.fusion.original import Fusion, continue_greedily, forced_logs, frozen
from offline.fusion.references import (
    References,
    direction_name,
    measure_references,
    write_references,
)
from offline.fusion.search import Kind, Target, segments_of
from offline.models import load_config, load_model
from tests.conftest import engine_arguments
from tests.engine_process import EngineProcess
from tests.reference import TOLERANCE

pytestmark = pytest.mark.engine
TOKENS = 24
SCALES: dict[Kind, list[tuple[float, ...]]] = {
    "full": [(0.25,), (0.4,), (1.0,)],
    "segmented": [(0.3, 0.5, 0.1), (0.01, 0.9, 0.4), (0.7, 0.2, 0.6)],
}


@dataclass(frozen=True, eq=False)
class Setting:
    """A model, what was measured on it, and an engine with the pack of it."""

    model: PreTrainedModel
    references: References
    engine: EngineProcess


@pytest.fixture(scope="module")
def setting(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setting]:
    _, tokenizer = load_config(model)
    loaded = load_model(model, "float32", "cpu")
    questions = gold_questions("heldout", 6, prefixed_reference=True)
    found = measure_references(loaded, tokenizer, questions)
    folder = tmp_path_factory.mktemp("fusion")
    pack = write_references(folder, "fusion", model, loaded, tokenizer, questions, found)
    engine = EngineProcess(engine_arguments(model, [pack], "eager"), forked=True)
    yield Setting(loaded, found, engine)
    engine.close()


def test_equals_the_frozen_delta_of_hugging_face(setting: Setting) -> None:
    """All prompts and kinds in one batch, each with a vector and scales of its own."""
    layers = setting.model.config.num_hidden_layers
    cases = [(kind, scales) for kind, tried in SCALES.items() for scales in tried]
    steerings = [
        Target("", "", f"fusion/{direction_name(row)}")
        .request(segments_of(kind, layers), scales)
        .steering()
        for row, (kind, scales) in enumerate(cases)
    ]
    outputs = setting.engine.generate(setting.references.prompts, steerings, TOKENS)
    answers = set()
    for row, ((kind, scales), output) in enumerate(zip(cases, outputs, strict=True)):
        by_layer = torch.zeros(layers)
        for segment, scale in zip(segments_of(kind, layers), scales, strict=True):
            by_layer[list(segment)] = scale
        prompt = setting.references.prompts[row]
        reference = torch.tensor(setting.references.reference[row])
        mean = torch.tensor(setting.references.prompt[row])
        delta = frozen(Fusion(prompt, reference, by_layer), mean)
        assert output.tokens == continue_greedily(setting.model, delta, prompt, TOKENS, None)
        expected = forced_logs(setting.model, delta, prompt, output.tokens).numpy()
        assert np.abs(output.logprobs - expected).max() < TOLERANCE
        plain = forced_logs(setting.model, None, prompt, output.tokens).numpy()
        assert np.abs(output.logprobs - plain).max() > 100 * TOLERANCE
        answers.add(tuple(output.tokens))
    assert len(answers) == len(cases)


def test_equal_products_are_equal_requests(setting: Setting) -> None:
    """One number per segment is all that a request has; a segment of all layers is the full one."""
    layers = setting.model.config.num_hidden_layers
    target = Target("", "", f"fusion/{direction_name(0)}")
    full = target.request(segments_of("full", layers), (0.5 * 0.6,)).steering()
    cut = target.request(segments_of("segmented", layers), (0.6 * 0.5,) * 3).steering()
    zero = target.request(segments_of("segmented", layers), (0.0,) * 3).steering()
    prompt = setting.references.prompts[0]
    one, two, three, plain = setting.engine.generate([prompt] * 4, [full, cut, zero, None], TOKENS)
    assert one.tokens == two.tokens
    assert np.abs(one.logprobs - two.logprobs).max() < TOLERANCE
    assert three.tokens == plain.tokens != one.tokens
    assert np.abs(three.logprobs - plain.logprobs).max() < TOLERANCE
