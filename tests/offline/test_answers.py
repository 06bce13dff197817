"""Answers read after both prompts: states by a plain loop over Hugging Face's outputs, and where they come from."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma3TextConfig

from tests.offline.answers_cases import prompts_of
from vllm_steer.errors import ExtractionError
from vllm_steer.offline.engine.tokens import Asked, Generated
from vllm_steer.offline.extract.answer_generation import (
    AnswerSettings,
    concept_answers,
    prefixed_answers,
)
from vllm_steer.offline.extract.answer_states import ANSWER_TOKENS, read_answers
from vllm_steer.offline.extract.answers import ConceptAnswers, Example
from vllm_steer.offline.models.prompts import Concept, RenderedPrompt

PREFIX = "Personify someone who is terrified of spiders."
QUESTIONS = ["rain is good, and so is the sun that follows it.", "no.", "rain is good.", "we"]


@pytest.fixture(scope="module")
def examples(chatml) -> list[Example]:
    """Prompts and answers of unequal lengths, in no order of length."""
    rng = np.random.default_rng(0)
    found = []
    for question, prefix, length in zip(
        QUESTIONS, (PREFIX, PREFIX * 2, "Be brave.", PREFIX), (3, 7, 2, 12), strict=True
    ):
        plain, prefixed = prompts_of(chatml, question, prefix)
        answer = tuple(rng.integers(20, 500, length).tolist())
        found.append(Example(plain, prefixed, answer, 0.0))
    return found


def outputs_of(model, example: Example, prefixed: bool):
    """Block outputs ``[blocks, length, hidden_size]``, attention and logits of one row, by Hugging Face alone."""
    prompt = example.prefixed if prefixed else example.plain
    last: list[torch.Tensor] = []
    handle = model.model.norm.register_forward_pre_hook(lambda _, args: last.append(args[0][0]))
    with torch.inference_mode():
        output = model(
            torch.tensor([[*prompt.token_ids, *example.answer]]),
            output_attentions=True,
            output_hidden_states=True,
        )
    handle.remove()
    states = [hidden[0] for hidden in output.hidden_states[1:-1]]
    return torch.stack([*states, last[0]]), output.attentions, output.logits[0]


def likely(logits: torch.Tensor, begin: int, answer: tuple[int, ...]) -> list[float]:
    """Log-likelihood of each token of an answer that begins there."""
    rows = [logits[begin + at - 1].log_softmax(dim=-1) for at in range(len(answer))]
    return [float(row[token]) for row, token in zip(rows, answer, strict=True)]


def by_hand(model, example: Example, tokens: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """States after the prefixed and the plain prompt, and the attention paid, token after token."""
    (with_prefix, attentions, sure), (without, _, unsure) = (
        outputs_of(model, example, p) for p in (True, False)
    )
    start, end = example.prefixed.prefix_span
    first, second = (len(p.token_ids) for p in (example.prefixed, example.plain))
    count = len(example.answer)
    gains = [
        max(a - b, 0.0)
        for a, b in zip(
            likely(sure, first, example.answer), likely(unsure, second, example.answer), strict=True
        )
    ]
    # Of the tokens that the answer's are predicted from.
    ahead = tokens == "telling"
    prefixed, plain, paid = [], [], []
    for block in range(3):
        sums = []
        for at in range(first - ahead, first + count - ahead):
            heads = [head[at, start:end].sum() for head in attentions[block][0]]
            sums.append(float(sum(heads) / len(heads)))
        weights = {
            "mean": [1 / count] * count,
            "weighted": [value / sum(sums) for value in sums],
            "attention": [float(at == int(np.argmax(sums))) for at in range(count)],
            "telling": [gain / sum(gains) for gain in gains],
        }[tokens]
        for side, states, begin in ((prefixed, with_prefix, first), (plain, without, second)):
            rows = [weight * states[block, begin + at - ahead] for at, weight in enumerate(weights)]
            side.append(torch.stack(rows).sum(0).numpy())
        paid.append(sum(weight * value for weight, value in zip(weights, sums, strict=True)))
    return np.stack(prefixed), np.stack(plain), np.array(paid)


@pytest.mark.parametrize("tokens", ANSWER_TOKENS)
@pytest.mark.parametrize("batch_size", [1, 3])
def test_states_are_those_of_a_plain_loop(tiny_model, examples, tokens, batch_size) -> None:
    """Of the same tokens with the same weights after both prompts, whatever else is in the batch."""
    found = read_answers(tiny_model, examples, tokens=tokens, attention=True, batch_size=batch_size)
    for row, example in enumerate(examples):
        prefixed, plain, paid = by_hand(tiny_model, example, tokens)
        scale = np.abs(prefixed).max(axis=1, keepdims=True)
        np.testing.assert_allclose(found.prefixed[row] / scale, prefixed / scale, atol=5e-6)
        np.testing.assert_allclose(found.plain[row] / scale, plain / scale, atol=5e-6)
        np.testing.assert_allclose(found.attention[row], paid, atol=1e-6)
        assert (paid > 0).all()


def test_norms_are_medians_over_plain_tokens_but_the_first_of_each(tiny_model, examples) -> None:
    found = read_answers(tiny_model, examples, tokens="mean", attention=False, batch_size=4)
    tokens = torch.cat(
        [outputs_of(tiny_model, e, False)[0][:, 1:].norm(dim=-1) for e in examples], 1
    )
    np.testing.assert_allclose(found.residual_norms, np.median(tokens.numpy(), axis=1), rtol=1e-5)


def test_without_attention_any_implementation_does(tiny_llama, examples) -> None:
    expected = read_answers(tiny_llama, examples, tokens="mean", attention=True, batch_size=4)
    tiny_llama.set_attn_implementation("sdpa")
    try:
        found = read_answers(tiny_llama, examples, tokens="mean", attention=False, batch_size=4)
        with pytest.raises(ExtractionError, match=r"blocks \[0, 1, 2\] gave no attention weights"):
            read_answers(tiny_llama, examples, tokens="weighted", attention=True, batch_size=4)
    finally:
        tiny_llama.set_attn_implementation("eager")
    np.testing.assert_allclose(found.prefixed, expected.prefixed, atol=1e-4)
    assert not found.attention.any()
    assert expected.attention.all()


@pytest.mark.parametrize("tokens", ["weighted", "attention"])
def test_a_block_that_sees_no_prefix_counts_all_tokens_alike_or_takes_one(tokens) -> None:
    """Blocks 0 and 2 see eight tokens back, where the prefix no longer is."""
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=100, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, sliding_window=8, pad_token_id=0,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    rng = np.random.default_rng(0)
    ids = rng.integers(3, 100, (2, 24)).tolist()
    examples = [
        Example(RenderedPrompt("", tuple(row[6:]), (0, 0)), RenderedPrompt("", tuple(row), (2, 6)),
                tuple(rng.integers(3, 100, 5).tolist()), 0.0)
        for row in ids
    ]  # fmt: skip
    # And one of whose prefix nothing is left.
    examples.append(
        replace(examples[0], prefixed=replace(examples[0].prefixed, prefix_span=(0, 0)))
    )
    found, means = (
        read_answers(model, examples, tokens=each, attention=True, batch_size=3)
        for each in (tokens, "mean")
    )
    assert np.isfinite(found.prefixed).all()
    assert not found.attention[:, [0, 2]].any()
    assert (found.attention[:2, 1] > 0).all()
    assert not found.attention[2].any()
    if tokens == "weighted":
        np.testing.assert_array_equal(found.prefixed[:, 0], means.prefixed[:, 0])
        assert not np.allclose(found.prefixed[:2, 1], means.prefixed[:2, 1])


class Speechless:
    """An engine whose model says nothing to prompts that hold a word, and two tokens to others."""

    def __init__(self, tokenizer, word: str) -> None:
        self._tokenizer, self._word = tokenizer, word

    def generate(self, asked: list[Asked], max_tokens: int, name: str) -> list[Generated]:
        texts = [self._tokenizer.decode(one.prompt) for one in asked]
        return [Generated((7,) if self._word in text else (7, 8), "", 0.0, True) for text in texts]

    def score(self, asked: list[Asked], name: str) -> list[float]:
        return [-1.0] * len(asked)


def test_answers_of_nothing_are_left_out(chatml) -> None:
    prefixes = [PREFIX, "Be brave."]
    found = prefixed_answers(Speechless(chatml, "sun that"), chatml, prefixes, QUESTIONS, 8)
    assert [len(examples) for examples in found] == [3, 3]
    for prefix, examples in zip(prefixes, found, strict=True):
        for question, example in zip(QUESTIONS[1:], examples, strict=True):
            assert f"user\n{question}<" in example.plain.text
            assert f"user\n{prefix}  {question}<" in example.prefixed.text
    concepts = [Concept("spiders", PREFIX), Concept("brave", "Be brave.")]
    given = (QUESTIONS[:2], QUESTIONS[2:], AnswerSettings(8))
    answers = concept_answers(Speechless(chatml, "sun that"), chatml, concepts, *given)
    assert [(len(a.learned), len(a.stopping)) for a in answers.values()] == [(1, 2), (1, 2)]
    assert all(f"{QUESTIONS[1]}<" in a.learned[0].plain.text for a in answers.values())
    with pytest.raises(ExtractionError, match="concept 'brave': .* are empty; try another prefix"):
        concept_answers(Speechless(chatml, "brave"), chatml, concepts, *given)


class Telling(Speechless):
    """An engine whose model finds each answer less likely after the plain prompt by what is given for it."""

    def __init__(self, tokenizer, by_question: dict[str, float]) -> None:
        super().__init__(tokenizer, "nothing of this kind")
        self._by_question = by_question

    def score(self, asked: list[Asked], name: str) -> list[float]:
        texts = [self._tokenizer.decode(one.prompt) for one in asked]
        assert not any(PREFIX in text for text in texts)
        return [
            -next(value for question, value in self._by_question.items() if question in text)
            for text in texts
        ]


def test_the_answers_that_tell_most_of_their_prefix_are_kept(chatml) -> None:
    """In the order of the questions, of those to learn from and of the others apart."""
    engine = Telling(chatml, dict(zip(QUESTIONS, (5.0, 1.0, 2.0, 9.0), strict=True)))
    given = (QUESTIONS[:3], QUESTIONS[3:], AnswerSettings(8, share=0.5))
    answers = concept_answers(engine, chatml, [Concept("spiders", PREFIX)], *given)["spiders"]
    kept = [[q for e in part for q in QUESTIONS if f"user\n{q}<" in e.plain.text]
            for part in (answers.learned, answers.stopping)]  # fmt: skip
    assert kept == [[QUESTIONS[0], QUESTIONS[2]], [QUESTIONS[3]]]


def test_the_digest_is_that_of_everything_that_is_learned_from(examples) -> None:
    answers = ConceptAnswers(tuple(examples[:2]), tuple(examples[2:]))
    other = replace(examples[3], answer=(*examples[3].answer, 9))
    changed = [
        ConceptAnswers(tuple(examples[:2]), (examples[2], other)),
        ConceptAnswers(tuple(examples[1::-1]), tuple(examples[2:])),
        ConceptAnswers(
            (examples[0], replace(examples[1], plain=examples[0].plain)), answers.stopping
        ),
    ]
    same = ConceptAnswers(tuple(examples[:2]), tuple(examples[2:]))
    assert same.digest == answers.digest
    assert len({answers.digest, *(each.digest for each in changed)}) == 4


def test_tokens_saved_is_what_the_prefix_takes(examples) -> None:
    lengths = [len(e.prefixed.token_ids) - len(e.plain.token_ids) for e in examples]
    answers = ConceptAnswers(tuple(examples[:2]), tuple(examples[2:]))
    assert answers.tokens_saved == int(np.median(lengths)) > 0
