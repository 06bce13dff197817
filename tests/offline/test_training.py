"""Training of directions: on the demo model that it works, on a tiny one that it does what it says."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

import vllm_steer.offline.train.objectives.likelihood
from tests.offline.answers_cases import QUESTIONS, examples_of, prompts_of
from vllm_steer.errors import ExtractionError
from vllm_steer.offline.demo import demo_model_path
from vllm_steer.offline.demo.concepts import prefix
from vllm_steer.offline.extract.answer_states import read_answers
from vllm_steer.offline.extract.answers import Example
from vllm_steer.offline.extract.training import (
    Lesson,
    Trained,
    TrainingOptions,
    train,
)
from vllm_steer.offline.models.likelihood import AnswerModel, padded
from vllm_steer.offline.models.loading import load_config, load_model
from vllm_steer.offline.train.batches import draws

LAYERS = (0, 1)
FEW = TrainingOptions(steps=4, answers=3, rate=0.05, every=2, batch_size=4)


@pytest.fixture(scope="module")
def tiny(tiny_llama) -> AnswerModel:
    return AnswerModel(tiny_llama, LAYERS)


@pytest.fixture(scope="module")
def lessons(tiny_llama, chatml) -> list[Lesson]:
    """Three concepts with different numbers of answers, each with a start of its own."""
    rng = np.random.default_rng(0)
    found = []
    for number, text in enumerate(("Fear the rain.", "Love the sun, and more.", "Be terse.")):
        asked = [f"{word} is good." for word in ("rain", "sun", "no", "wind", "we", "all")]
        examples = examples_of(tiny_llama, chatml, text, asked[: 4 + number], 6)
        start = rng.standard_normal((2, 32)).astype(np.float32)
        found.append(Lesson(examples[:-2], examples[-2:], start))
    return found


@pytest.fixture(scope="module")
def norms(tiny_llama, lessons) -> np.ndarray:
    measured = [
        read_answers(tiny_llama, lesson.learned, tokens="mean", attention=False, batch_size=4)
        for lesson in lessons
    ]
    return np.stack([states.residual_norms[list(LAYERS)] for states in measured], dtype=np.float32)


def loss(answers: AnswerModel, examples: list[Example], vectors: np.ndarray | None) -> float:
    """Mean negative log-likelihood of a token of the answers after the plain prompts."""
    batch = padded(
        [e.plain.token_ids for e in examples], [e.answer for e in examples], torch.device("cpu")
    )
    change = None if vectors is None else torch.tensor(vectors)[None]
    with torch.no_grad():
        total = answers.log_likelihoods(batch, change).sum()
    return -float(total) / sum(len(e.answer) for e in examples)


def relative(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.linalg.norm(one - other) / np.linalg.norm(other))


def test_directions_of_the_demo_model_close_the_gap() -> None:
    """The loss of answers that were not trained on falls most of the way to that of the prefix."""
    _, tokenizer = load_config(demo_model_path())
    model = load_model(demo_model_path(), "float32", "cpu", None)
    answers = AnswerModel(model, (1, 2, 3))
    lessons, norms = [], []
    for concept in ("spiders", "Tokyo"):
        examples = examples_of(model, tokenizer, prefix(concept), QUESTIONS[:14], 24)
        states = read_answers(model, examples[:8], tokens="mean", attention=False, batch_size=8)
        norms.append(states.residual_norms[1:4])
        lessons.append(Lesson(examples[:8], examples[8:11], np.zeros((3, 256), np.float32)))
        heldout = examples[11:]
    options = TrainingOptions(steps=12, answers=4, rate=0.02, every=4)
    found = train(answers, lessons, np.stack(norms).astype(np.float32), options)
    for lesson, trained in zip(lessons, found, strict=True):
        assert trained.gap_closed > 0.5
        before, after = (loss(answers, lesson.learned, v) for v in (None, trained.vectors))
        assert after < 0.5 * before
    # Of the second concept, on questions that it has not seen at all.
    own, other = (loss(answers, heldout, each.vectors) for each in found[::-1])
    plain = loss(answers, heldout, None)
    assert own < 0.5 * plain
    assert own < 0.5 * other


def test_a_concept_is_trained_alone_as_it_is_with_others(tiny, lessons, norms) -> None:
    together = train(tiny, lessons, norms, FEW)
    for at, expected in enumerate(together):
        (alone,) = train(tiny, lessons[at : at + 1], norms[at : at + 1], FEW)
        assert relative(alone.vectors, expected.vectors) < 1e-3
        assert alone.gap_closed == pytest.approx(expected.gap_closed, abs=1e-3)
        assert alone.steps == expected.steps
        assert relative(alone.vectors, lessons[at].start) > 0.01
    batched = train(tiny, lessons, norms, replace(FEW, batch_size=2))
    for one, other in zip(batched, together, strict=True):
        assert relative(one.vectors, other.vectors) < 1e-3


def test_the_same_seed_gives_the_same_bytes(tiny, lessons, norms) -> None:
    first, again, other = (
        train(tiny, lessons, norms, replace(FEW, seed=seed))[2].vectors for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert relative(other, first) > 1e-3


@pytest.mark.parametrize("penalty", [0.0, 3.0])
def test_a_step_goes_down_the_loss_per_token_and_the_penalty(tiny, lessons, norms, penalty) -> None:
    """In units of the block's norm: the penalty is the mean share of it, squared."""
    lesson = lessons[0]
    options = replace(FEW, steps=1, answers=len(lesson.learned), rate=1e-4, penalty=penalty)
    (found,) = train(tiny, [lesson], norms[:1], options)
    given = torch.tensor(lesson.start)[None].requires_grad_(True)
    answers = [e.answer for e in lesson.learned]
    batch = padded([e.plain.token_ids for e in lesson.learned], answers, torch.device("cpu"))
    total = -tiny.log_likelihoods(batch, given).sum() / sum(map(len, answers))
    total += penalty * (given.norm(dim=-1) / torch.tensor(norms[0])).square().mean()
    gradient = torch.autograd.grad(total, given)[0][0].numpy() * norms[0][:, None]
    # The first step of Adam has the size of the rate and the sign of the gradient.
    expected = -1e-4 * np.sign(gradient) * norms[0][:, None] / 32**0.5
    large = np.abs(gradient) > 0.02 * np.abs(gradient).max()
    assert large.mean() > 0.8
    np.testing.assert_allclose((found.vectors - lesson.start)[large], expected[large], rtol=2e-2)
    if not penalty:
        assert loss(tiny, lesson.learned, found.vectors) < loss(tiny, lesson.learned, lesson.start)


def scaled(model: torch.nn.Module, factor: float) -> torch.nn.Module:
    """The same function with a residual stream that is longer by a factor."""
    longer = copy.deepcopy(model)
    with torch.no_grad():
        longer.model.embed_tokens.weight *= factor
        for block in longer.model.layers:
            block.self_attn.o_proj.weight *= factor
            block.mlp.down_proj.weight *= factor
            for norm in (block.input_layernorm, block.post_attention_layernorm):
                norm.variance_epsilon *= factor**2
        longer.model.norm.variance_epsilon *= factor**2
    return longer


def test_steps_are_relative_to_the_stream(tiny, tiny_llama, lessons, norms) -> None:
    """A stream that is eight times as long, of the same model otherwise, wants vectors as much longer."""
    found = train(tiny, lessons, norms, FEW)
    longer = AnswerModel(scaled(tiny_llama, 8), LAYERS)
    states = read_answers(
        longer.model, lessons[0].learned, tokens="mean", attention=False, batch_size=4
    )
    np.testing.assert_allclose(states.residual_norms[list(LAYERS)], 8 * norms[0], rtol=1e-4)
    starts = [replace(lesson, start=8 * lesson.start) for lesson in lessons]
    for one, other in zip(train(longer, starts, 8 * norms, FEW), found, strict=True):
        assert relative(one.vectors, 8 * other.vectors) < 1e-3
        assert one.gap_closed == pytest.approx(other.gap_closed, abs=1e-3)
    # Each block by its own norm: where one is said to be longer, its steps alone are.
    told = norms * np.array([1, 8], dtype=np.float32)
    one_step = replace(FEW, steps=1, every=1)
    small, large = (
        train(tiny, lessons[:1], given[:1], one_step)[0].vectors - lessons[0].start
        for given in (norms, told)
    )
    np.testing.assert_allclose(large[0], small[0], rtol=1e-2, atol=1e-6)
    np.testing.assert_allclose(np.abs(large[1]), 8 * np.abs(small[1]), rtol=1e-2)


def test_the_penalty_shortens_vectors(tiny, lessons, norms) -> None:
    options = replace(FEW, steps=12, every=12)
    free, bound = (
        train(tiny, lessons, norms, replace(options, penalty=penalty)) for penalty in (0.0, 3.0)
    )
    for long, short in zip(free, bound, strict=True):
        ratio = np.linalg.norm(short.vectors) / np.linalg.norm(long.vectors)
        assert ratio < 0.9


@pytest.fixture
def scripted(monkeypatch) -> list[float]:
    """What the looks of a training see in place of the gap closed, in turn."""
    gaps: list[float] = []
    monkeypatch.setattr(
        vllm_steer.offline.train.objectives.likelihood, "closed", lambda *_: gaps.pop(0)
    )
    return gaps


def test_a_concept_stops_and_keeps_its_best(tiny, lessons, norms, scripted) -> None:
    options = replace(FEW, steps=9, every=1, patience=2)

    def run(gaps: list[float], steps: int = 9) -> Trained:
        scripted[:] = gaps
        return train(tiny, lessons[:1], norms[:1], replace(options, steps=steps))[0]

    found = run([0.1, 0.5, 0.4, 0.5, 0.9])
    assert (found.gap_closed, found.steps) == (0.5, 2)
    # It ended without a fifth look.
    assert scripted == [0.9]
    np.testing.assert_array_equal(found.vectors, run([0.1, 0.5], steps=2).vectors)
    late = run([0.1, 0.0, 0.2, 0.1, 0.3, 0.2, 0.4, 0.3, 0.5])
    assert (late.gap_closed, late.steps) == (0.5, 9)


def test_a_concept_that_stops_leaves_the_others_alone(tiny, lessons, norms, scripted) -> None:
    options = replace(FEW, steps=4, every=1, patience=1)
    # By turns; the first stops at the second look.
    scripted[:] = [0.2, 0.1, 0.1, 0.2, 0.3, 0.4]
    first, second = train(tiny, lessons[:2], norms[:2], options)
    assert (first.gap_closed, first.steps) == (0.2, 1)
    assert (second.gap_closed, second.steps) == (0.4, 4)
    scripted[:] = [0.1, 0.2, 0.3, 0.4]
    (alone,) = train(tiny, lessons[1:2], norms[1:2], options)
    assert relative(second.vectors, alone.vectors) < 1e-3


@pytest.mark.parametrize(("count", "size"), [(10, 4), (7, 7), (3, 8), (64, 8)])
def test_all_answers_are_drawn_before_any_is_drawn_again(count, size) -> None:
    source = draws(count, size, seed=3)
    drawn = [next(source) for _ in range(30)]
    assert {len(each) for each in drawn} == {min(size, count)}
    every = [answer for each in drawn for answer in each]
    for begin in range(0, len(every) - count + 1, count):
        assert sorted(every[begin : begin + count]) == list(range(count))
    assert every[:count] != every[count : 2 * count]


@pytest.mark.parametrize(
    "options", [{"rate": 1e37}, {"rate": 1e37, "steps": 1, "every": 1}], ids=str
)
def test_a_loss_that_is_not_finite_is_refused(tiny, lessons, norms, options) -> None:
    with pytest.raises(
        ExtractionError, match="loss of training is not finite; .* smaller train_rate"
    ):
        train(tiny, lessons, 1e6 * norms, replace(FEW, **options))


def test_prompts_differ_in_the_prefix_alone(chatml) -> None:
    plain, prefixed = prompts_of(chatml, "rain is good.", "Be brave.")
    start, end = prefixed.prefix_span
    rest = prefixed.token_ids[:start] + prefixed.token_ids[end:]
    assert chatml.decode(rest).split() == chatml.decode(plain.token_ids).split()
