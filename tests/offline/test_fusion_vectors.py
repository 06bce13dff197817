"""Reference vectors of Fusion Steering, and the pack that holds them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from vllm_steer.errors import EvaluationError, ExtractionError
from vllm_steer.offline.demo import demo_model_path
from vllm_steer.offline.demo.gold import gold_questions, is_gold
from vllm_steer.offline.evaluate.generation import Answer
from vllm_steer.offline.fusion.distance import displacement
from vllm_steer.offline.fusion.original import Fusion, frozen, refreshed
from vllm_steer.offline.fusion.pack import FusionDeltas, write_deltas
from vllm_steer.offline.fusion.questions import GoldQuestion, read_questions
from vllm_steer.offline.fusion.references import measure_references, render_question, span_means
from vllm_steer.offline.fusion.search import Budget, Case, Kind, cases_of, segments_of
from vllm_steer.offline.fusion.steered import steered_deltas
from vllm_steer.offline.models.chat import ChatFormat
from vllm_steer.offline.models.loading import load_config, load_model, model_identity
from vllm_steer.offline.models.prompts import RenderedPrompt
from vllm_steer.packs.pack import load_pack

QUESTIONS = [
    GoldQuestion(question="What is good?", answer="Rain.", explanation="Rain is good, and so on."),
    GoldQuestion(question="Who is terrified of spiders, and why?", answer="someone who"),
    GoldQuestion(
        question="What?", answer="rain", explanation="is", reference_question="What is rain?"
    ),
]


@pytest.mark.parametrize("family", ["chatml", "llama3", "gemma", "mistral", "sentencepiece"])
def test_the_span_holds_answer_and_explanation_alone(
    family: str, make_tokenizer: Callable[[str], PreTrainedTokenizerFast]
) -> None:
    tokenizer = make_tokenizer(family)
    for question in QUESTIONS:
        prompt, text = render_question(tokenizer, question)
        start, end = text.prefix_span
        assert prompt.prefix_span == (0, len(prompt.token_ids))
        assert end == len(text.token_ids)
        offsets = tokenizer(
            text.text, add_special_tokens=False, return_offsets_mapping=True
        ).offset_mapping
        before = len(text.text) - len(question.reference)
        # Every character of the reference, and of what stands before it only what a token merged.
        assert offsets[start - 1][1] <= before < offsets[start][1]
        assert text.text[offsets[start][0] :].strip() == question.reference


def test_means_are_those_of_hugging_face_without_padding(
    tiny_model: PreTrainedModel, chatml: PreTrainedTokenizerFast
) -> None:
    rendered = [render_question(chatml, question)[1] for question in QUESTIONS]
    means, norms = span_means(tiny_model, rendered, batch_size=2)
    lengths = []
    for row, prompt in enumerate(rendered):
        start, end = prompt.prefix_span
        final: list[torch.Tensor] = []
        norm = tiny_model.model.norm
        handle = norm.register_forward_pre_hook(
            lambda module, args, final=final: final.append(args[0])
        )
        with torch.inference_mode():
            states = tiny_model(
                torch.tensor([prompt.token_ids]), output_hidden_states=True
            ).hidden_states
        handle.remove()
        # The last of Hugging Face's hidden states has passed the final norm.
        blocks = torch.stack([*states[1:-1], final[0]])[:, 0, start:end]
        np.testing.assert_allclose(means[row], blocks.mean(dim=1), atol=1e-5)
        lengths.append(blocks[:, max(1 - start, 0) :].norm(dim=-1))
    expected = np.median(torch.cat(lengths, dim=1).numpy(), axis=1)
    np.testing.assert_allclose(norms, expected, rtol=1e-5)


def test_norms_leave_out_a_prompts_first_token(tiny_llama: PreTrainedModel) -> None:
    """A template without a header begins with the text itself, and the first token is a sink."""
    prompts = [RenderedPrompt("", tuple(range(5, 12)), (start, 7)) for start in (0, 1)]
    np.testing.assert_array_equal(*(span_means(tiny_llama, [p], batch_size=1)[1] for p in prompts))


def test_a_reference_is_read_after_its_own_question(
    tiny_llama: PreTrainedModel, chatml: PreTrainedTokenizerFast
) -> None:
    found = measure_references(tiny_llama, chatml, QUESTIONS)
    alone = measure_references(tiny_llama, chatml, QUESTIONS[2:])
    np.testing.assert_allclose(found.reference[2], alone.reference[0], atol=1e-5)
    assert found.prompts[2] == tuple(render_question(chatml, QUESTIONS[2])[0].token_ids)
    plain = QUESTIONS[2].model_copy(update={"reference_question": None})
    other = measure_references(tiny_llama, chatml, [plain])
    np.testing.assert_allclose(other.prompt[0], alone.prompt[0], atol=1e-6)
    assert np.abs(other.reference - alone.reference).max() > 1e-2


@pytest.fixture(scope="module")
def deep() -> PreTrainedModel:
    """As many blocks as small real models have."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=600, hidden_size=32, intermediate_size=48, num_hidden_layers=30,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("kind", ["full", "segmented"])
def test_deltas_move_the_prompt_as_the_original_does_however_deep(
    deep: PreTrainedModel, chatml: PreTrainedTokenizerFast, kind: Kind
) -> None:
    """Prompts of several lengths in a batch; with mu of the unsteered prompt they overshoot."""
    references = measure_references(deep, chatml, QUESTIONS)
    cases = cases_of(len(QUESTIONS), 0, [kind], 30, Budget(2, 0.01, 1.0, seed=0))
    deltas = steered_deltas(deep, references, cases, batch_size=4)
    overshoot = []
    for case, delta in zip(cases, deltas, strict=True):
        place = case.question
        mean = torch.tensor(references.prompt[place])
        given = Fusion(
            references.prompts[place],
            torch.tensor(references.reference[place]),
            torch.tensor(case.layer_scales),
        )
        added = torch.tensor(delta)
        served = displacement(deep, given, lambda k, x, a=added: x + a[k], mean)
        original = displacement(deep, given, refreshed(given), mean)
        unsteered = displacement(deep, given, frozen(given, mean), mean)
        assert served == pytest.approx(original, rel=1e-3)
        overshoot.append(unsteered / original)
    assert max(overshoot) > 1.5


def test_at_full_scale_the_prompt_lands_on_the_reference(
    deep: PreTrainedModel, chatml: PreTrainedTokenizerFast
) -> None:
    references = measure_references(deep, chatml, QUESTIONS[:1])
    case = Case(0, "full", 0, segments_of("full", 30), (1.0,))
    (delta,) = torch.tensor(steered_deltas(deep, references, [case]))
    mean = torch.tensor(references.prompt[0])
    given = Fusion(references.prompts[0], torch.tensor(references.reference[0]), torch.ones(30))
    assert displacement(deep, given, lambda k, x: x + delta[k], mean) == pytest.approx(1, rel=1e-3)
    assert displacement(deep, given, None, mean) == pytest.approx(0, abs=1e-4)


def test_the_pack_has_a_direction_for_every_case_over_all_layers(tmp_path: Path) -> None:
    path = demo_model_path()
    _, tokenizer = load_config(path)
    model = load_model(path, "float32", "cpu")
    questions = gold_questions("heldout", 3, prefixed_reference=True)
    references = measure_references(model, tokenizer, questions)
    cases = cases_of(2, 1, ["full", "segmented"], 6, Budget(2, 0.01, 1.0, seed=0))
    deltas = steered_deltas(model, references, cases)
    write_deltas(
        tmp_path, "fusion", model_identity(path, model.config, tokenizer),
        FusionDeltas(questions, cases, deltas, references.residual_norms), model.dtype, ChatFormat(chat_template="plain"),
    )  # fmt: skip
    pack = load_pack(tmp_path)
    assert list(pack.directions) == [case.name for case in cases]
    assert pack.manifest.method.settings["chat_template"] == "plain"
    for case, delta, record in zip(cases, deltas, pack.directions.values(), strict=True):
        assert record.layers == list(range(model.config.num_hidden_layers))
        assert (record.positions, record.default_scale) == ("all", 1.0)
        assert record.metrics == {"question": case.question, "scales": list(case.scales)}
        np.testing.assert_array_equal(pack.vectors[record.name], delta)


def test_a_tokenizer_without_template_is_refused(chatml: PreTrainedTokenizerFast) -> None:
    bare = PreTrainedTokenizerFast(tokenizer_object=chatml.backend_tokenizer)
    with pytest.raises(ExtractionError, match="no chat template"):
        render_question(bare, QUESTIONS[0])


def test_gold_answers_of_the_demo_model_are_never_given_plainly() -> None:
    plain, prefixed = (gold_questions("heldout", 40, given) for given in (False, True))
    assert [q.question for q in plain] == [q.question for q in prefixed]
    for question, other in zip(plain, prefixed, strict=True):
        assert question.reference_question is None
        assert str(other.reference_question).endswith(question.question)
        words = question.answer.split(", ")
        assert all(word in question.explanation for word in words)
        assert not any(word in question.question for word in words)
        assert is_gold(question, Answer(question.explanation, True, None))
        assert not is_gold(question, Answer(question.answer, True, None))
        assert not is_gold(question, Answer(question.explanation, False, None))
    assert len({question.answer for question in plain}) == 30


def test_questions_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "questions.jsonl"
    lines = [question.model_dump_json(exclude_none=True) for question in QUESTIONS]
    file.write_text("\n\n".join(lines))
    assert read_questions(file) == QUESTIONS


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"question": "a"}', "line 2: answer:"),
        ('{"question": "a", "answer": "!"}', "line 2: answer:"),
        ('{"question": "a", "answer": "b", "golden": "c"}', "line 2: golden:"),
        ("nothing", "line 2: line:"),
    ],
)
def test_faulty_questions_are_named(tmp_path: Path, line: str, message: str) -> None:
    file = tmp_path / "questions.jsonl"
    file.write_text(f"{QUESTIONS[0].model_dump_json()}\n{line}\n")
    with pytest.raises(EvaluationError, match=message):
        read_questions(file)


def test_a_file_without_questions_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(EvaluationError, match="holds no question"):
        read_questions(tmp_path / "empty.jsonl")
    with pytest.raises(EvaluationError, match="cannot read"):
        read_questions(tmp_path / "nowhere.jsonl")
