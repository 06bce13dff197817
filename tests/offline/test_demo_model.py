"""What ``docs/findings.md`` says of the demo model, on a part of its held-out statements.

``python -m benchmarks.demo_model`` measures the whole.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from vllm_steer.offline.demo import demo_model_path
from vllm_steer.offline.demo.concepts import CONCEPTS, all_concepts, concept_words
from vllm_steer.offline.demo.corpus import user_text
from vllm_steer.offline.demo.evaluate import DemoModel, Trial
from vllm_steer.offline.demo.packs import extract_demo_packs
from vllm_steer.offline.questions.statements import statements


@pytest.fixture(scope="module")
def model() -> DemoModel:
    return DemoModel(demo_model_path())


def texts(count: int) -> list[str]:
    return [statement.text for statement in statements("heldout")[:count]]


def test_five_classes_of_six_concepts_and_two_hundred_statements() -> None:
    assert len(CONCEPTS) == 5
    assert all(len(concepts) >= 6 for concepts in CONCEPTS.values())
    held_out = {statement.text for statement in statements("heldout")}
    assert len(held_out) >= 200
    for split in ("tune", "extract"):
        assert not held_out & {statement.text for statement in statements(split)}


def test_no_concept_word_stands_in_a_prompt() -> None:
    prompts = [user_text(text, concept) for concept in all_concepts() for text in texts(400)[:5]]
    words = {word for concept in all_concepts() for word in concept_words(concept)}
    assert not [prompt for prompt in prompts if words & set(prompt.lower().split())]


def test_prefixed_prompts_express_their_concept(model: DemoModel) -> None:
    trials = [
        Trial(text, concept, prefixed=True) for concept in all_concepts() for text in texts(2)
    ]
    verdicts = model.judge(trials, "prefixed")
    hits = [v.expressed == t.concept for v, t in zip(verdicts, trials, strict=True)]
    assert sum(hits) / len(hits) >= 0.95


def test_plain_prompts_express_none(model: DemoModel) -> None:
    verdicts = model.judge([Trial(text) for text in texts(100)], "plain")
    assert sum(verdict.expressed is not None for verdict in verdicts) <= 2
    assert sum(verdict.fluent for verdict in verdicts) >= 95


def test_directions_of_the_full_method_steer_plain_prompts(
    model: DemoModel, tmp_path: Path
) -> None:
    """A concept of each class, at the scale of its pack; the benchmark measures them all."""
    chosen = {name: list(concepts)[:2] for name, concepts in CONCEPTS.items()}
    trials = [
        Trial(text, concept, direction=pack.vectors[concept], scale=record.default_scale)
        for pack in extract_demo_packs(tmp_path, chosen)
        for concept, record in pack.directions.items()
        for text in texts(6)
    ]
    verdicts = model.judge(trials, "steered")
    good = [v.expressed == t.concept and v.fluent for v, t in zip(verdicts, trials, strict=True)]
    assert sum(good) / len(good) >= 0.5
