"""Directions from scored answers: each method against a plain reading of its paper, and what files and judges may say."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import pearsonr
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from vllm_steer.errors import ExtractionError
from vllm_steer.offline.engine.tokens import Asked, Generated, Sampling
from vllm_steer.offline.evaluate.judges import Case, Grade
from vllm_steer.offline.rollouts.data import Asking, read_askings
from vllm_steer.offline.rollouts.directions import corrsteer, persona_pairs, roast
from vllm_steer.offline.rollouts.methods import ROLLOUT_METHODS
from vllm_steer.offline.rollouts.sampled import Rollout, sampled, scored
from vllm_steer.offline.rollouts.settings import RolloutSettings, read_settings
from vllm_steer.offline.rollouts.states import read_states

RANDOM = np.random.default_rng(0)


def answer(
    question: int, draw: int, score: float | None, side: int = 0, text: str = "yes"
) -> Rollout:
    return Rollout(question, side, draw, (1, 2), (3,), text, True, score)


def test_roast_is_the_mean_of_questions_of_all_pairs_at_length_one() -> None:
    states = torch.randn(9, 3, 8, generator=torch.Generator().manual_seed(0))
    states[4] *= 50
    questions = [0, 0, 0, 1, 1, 1, 1, 2, 2]
    right = [True, False, False, True, True, False, False, True, True]
    votes = []
    for question in (0, 1):
        own = [at for at, q in enumerate(questions) if q == question]
        pairs = [states[a] - states[b] for a in own for b in own if right[a] and not right[b]]
        votes.append(torch.nn.functional.normalize(torch.stack(pairs).mean(0), dim=-1))
    found, voted = roast(states.numpy(), np.array(questions), np.array(right))
    assert voted == 2
    np.testing.assert_allclose(found, torch.stack(votes).mean(0).numpy(), atol=1e-6)


@pytest.mark.parametrize("right", [[True, True], [False, False]])
def test_roast_needs_right_and_wrong_answers_to_one_question(right: list[bool]) -> None:
    states = RANDOM.normal(size=(2, 1, 4)).astype(np.float32)
    with pytest.raises(ExtractionError, match="no question has right and wrong answers"):
        roast(states, np.zeros(2, np.int64), np.array(right))
    with pytest.raises(ExtractionError, match="no question has right and wrong answers"):
        roast(states, np.arange(2), np.array([True, False]))


def test_persona_takes_pairs_of_one_question_and_draw_that_the_judge_tells_apart() -> None:
    loop = "so it goes " * 9
    rollouts = [
        answer(0, 0, 0.5),
        answer(0, 0, 0.49, side=1),
        answer(0, 1, 0.4),
        answer(0, 1, 0.0, side=1),
        answer(0, 2, 1.0),
        answer(0, 2, 0.5, side=1),
        answer(1, 0, 1.0, text=loop),
        answer(1, 0, 0.0, side=1),
        answer(2, 0, 1.0),
        answer(3, 0, 0.9, side=0),
        answer(3, 0, 0.1, side=1),
    ]
    assert persona_pairs(rollouts, 0.5) == [(0, 1), (9, 10)]
    with pytest.raises(ExtractionError, match="of no pair of answers"):
        persona_pairs(rollouts[2:4], 0.5)


def test_corrsteer_chooses_by_pearson_and_adds_the_mean_of_right_answers() -> None:
    features = RANDOM.normal(size=(12, 2, 5)).astype(np.float32)
    features[:, 0, 4] = 7.0
    scores = RANDOM.uniform(size=12)
    # In both blocks one feature goes with the score.
    features[:, :, 2] += scores[:, None]
    right = scores >= 0.5
    decoder = RANDOM.normal(size=(2, 5, 3)).astype(np.float32)
    best = [
        max((pearsonr(features[:, b, f], scores)[0], f) for f in range(5 - (b == 0)))
        for b in range(2)
    ]
    each = corrsteer(features, scores, right, [4, 9], True, decoder)
    assert each.layers == [4, 9]
    assert each.metrics["features"] == [f for _, f in best]
    np.testing.assert_allclose(each.metrics["correlations"], [r for r, _ in best], rtol=1e-5)
    for at, (_, f) in enumerate(best):
        expected = features[right, at, f].mean() * decoder[at, f]
        np.testing.assert_allclose(each.vectors[at], expected, rtol=1e-5)
    one = corrsteer(features, scores, right, [4, 9], False)
    at = int(np.argmax([r for r, _ in best]))
    assert one.layers == [(4, 9)[at]]
    assert np.flatnonzero(one.vectors[0]).tolist() == [best[at][1]]


def test_corrsteer_refuses_what_no_correlation_has() -> None:
    features = RANDOM.normal(size=(4, 1, 3)).astype(np.float32)
    ones = np.ones(4)
    with pytest.raises(ExtractionError, match="all 4 answers have the score 1"):
        corrsteer(features, ones, ones > 0, [1], True)
    with pytest.raises(ExtractionError, match="no answer is right"):
        corrsteer(features, np.arange(4.0), np.zeros(4, np.bool_), [1], True)
    constant = np.ones_like(features)
    with pytest.raises(ExtractionError, match="no feature goes with the score"):
        corrsteer(constant, np.arange(4.0), np.arange(4) > 2, [1], False)


@pytest.mark.parametrize("pool", ["last", "mean", "max"])
def test_states_are_those_of_the_answer_alone(tiny_model: PreTrainedModel, pool: str) -> None:
    """In one padded batch, and in batches of two."""
    rollouts = [
        Rollout(0, 0, at, tuple(range(5, 5 + prompt)), tuple(range(50, 50 + length)), "", True)
        for at, (prompt, length) in enumerate([(4, 3), (9, 1), (2, 6)])
    ]
    for size in (2, 8):
        found = read_states(tiny_model, rollouts, pool, size)
        for at, each in enumerate(rollouts):
            with torch.no_grad():
                ids = torch.tensor([[*each.prompt, *each.answer]])
                hidden = tiny_model(ids, output_hidden_states=True).hidden_states
            start, end = len(each.prompt), ids.shape[1]
            # The last one of hidden_states is after the final norm.
            for block in range(len(hidden) - 2):
                h = hidden[block + 1][0]
                expected = {
                    "last": h[end - 1],
                    "mean": h[start:end].mean(0),
                    "max": h[start - 1 : end - 1].amax(0),
                }[pool]
                np.testing.assert_allclose(found[at, block], expected, atol=1e-5)


class Engine:
    """Says what it was asked."""

    def generate(
        self, asked: Sequence[Asked], max_tokens: int, name: str, sampling: Sampling | None
    ) -> list[Generated]:
        self.asked, self.sampling = list(asked), sampling
        return [Generated((1, 2), f"{one.seed}", -1.0, True) for one in asked]


class Judge:
    """Gives what it is told to give."""

    name = "test"

    def __init__(self, grades: Sequence[Grade]) -> None:
        self.grades, self.cases = list(grades), list[Case]()

    def grade(self, cases: Sequence[Case]) -> list[Grade]:
        self.cases = list(cases)
        return self.grades[: len(cases)]


def settings(method: str, **given: Any) -> RolloutSettings:
    return read_settings(None, {"method": method, **given})


def test_every_draw_has_its_seed_and_both_sides_the_same_questions(
    chatml: PreTrainedTokenizerFast,
) -> None:
    engine, asked = Engine(), {"it": [Asking("Why?", None, ("Be bold.", "Be shy."))]}
    chosen = settings("persona", samples=2, seed=7)
    found = sampled(engine, chatml, asked, chosen)["it"]  # type: ignore[arg-type]
    assert [(r.side, r.draw, r.text) for r in found] == [
        (0, 0, "7"),
        (0, 1, "8"),
        (1, 0, "9"),
        (1, 1, "10"),
    ]
    assert engine.sampling == Sampling(1.0, 1.0)
    texts = [chatml.decode(one.prompt) for one in engine.asked]
    assert ["Be bold." in text for text in texts] == [True, True, False, False]
    assert all("Why?" in text for text in texts)


def test_judges_are_told_the_reference_and_see_no_empty_answers() -> None:
    asked = {"it": [Asking("Two and two?", "4")]}
    given = {
        "it": [answer(0, 0, None, text="four"), answer(0, 1, None, text=" \n"), answer(0, 2, None)]
    }
    judge = Judge([Grade(1.0), Grade(None, "no idea")])
    found = scored(judge, asked, given)
    assert [case.reference for case in judge.cases] == ["4", "4"]
    assert found == {"it": [replace(given["it"][0], score=1.0)]}


@pytest.mark.parametrize(
    ("text", "grades", "message"),
    [
        (
            "yes",
            [Grade(None, "it mumbles")],
            "no answer was given a score; the first error: it mumbles",
        ),
        ("", [], "all answers are empty"),
    ],
)
def test_nothing_is_learned_from_nothing(text: str, grades: list[Grade], message: str) -> None:
    with pytest.raises(ExtractionError, match=message):
        scored(Judge(grades), {"it": [Asking("Why?")]}, {"it": [answer(0, 0, None, text=text)]})


TRAIT = {"instruction": [{"pos": "Be bold.", "neg": "Be shy."}], "questions": ["Why?", "How?"]}


def test_files(tmp_path: Path) -> None:
    lines = tmp_path / "lines.jsonl"
    lines.write_text('{"prompt": "Two and two?", "reference": "4"}\n\n{"prompt": "Why?"}\n')
    found = read_askings([f"sums={lines}"], ROLLOUT_METHODS["roast"])
    assert found == {"sums": [Asking("Two and two?", "4"), Asking("Why?")]}
    trait = tmp_path / "trait.json"
    trait.write_text(json.dumps({**TRAIT, "eval_prompt": "How bold is {answer}?"}))
    bold = read_askings([f"bold={trait}"], ROLLOUT_METHODS["persona"])["bold"]
    assert [a.prompt for a in bold] == ["Why?", "How?"]
    assert bold[0].instructions == ("Be bold.", "Be shy.")


@pytest.mark.parametrize(
    ("method", "text", "message"),
    [
        ("roast", "", "has no questions"),
        ("roast", "Two and two?", "line 1: must be a JSON object"),
        ("roast", '{"prompt": " "}', "prompt"),
        ("roast", '{"prompt": "a"}\n{"prompt": "a"}', "line 2: its prompt was asked before"),
        ("corrsteer", '{"prompt": "a", "answer": "b"}', "answer"),
        ("persona", "", "must be a JSON object with instruction"),
        ("persona", '{"instruction": [], "questions": ["a"]}', "instruction"),
        ("persona", '{"instruction": [{"pos": "a"}], "questions": ["a"]}', "neg"),
        ("persona", "[1]", "must be a JSON object with instruction"),
    ],
)
def test_malformed_files(tmp_path: Path, method: str, text: str, message: str) -> None:
    file = tmp_path / "file"
    file.write_text(text)
    with pytest.raises(ExtractionError, match=message):
        read_askings([f"it={file}"], ROLLOUT_METHODS[method])


@pytest.mark.parametrize("item", ["it", "=file", "it="])
def test_malformed_items(item: str) -> None:
    with pytest.raises(ExtractionError, match="NAME=FILE|cannot be a direction's name"):
        read_askings([item], ROLLOUT_METHODS["roast"])


@pytest.mark.parametrize(
    "given",
    [
        {"method": "roast", "samples": 0},
        {"method": "roast", "temperature": 0},
        {"method": "roast", "features": "each"},
        {"method": "corrsteer", "prefix_role": "user"},
        {"method": "roast", "estimator": "pca"},
        {"method": "caa"},
        {},
    ],
)
def test_malformed_settings(given: dict[str, Any]) -> None:
    with pytest.raises(ExtractionError, match="settings cannot be used"):
        read_settings(None, given)
