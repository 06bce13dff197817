"""Texts that probes are measured on, what of them is refused, and halves that are apart."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase

from vllm_steer.errors import EvaluationError
from vllm_steer.offline.demo import demo_model_path
from vllm_steer.offline.measures.detection import auroc
from vllm_steer.offline.models.loading import load_config
from vllm_steer.offline.models.prompts import render_question
from vllm_steer.offline.probe.run import ProbeScores, halved, measured
from vllm_steer.offline.probe.settings import ProbeSettings
from vllm_steer.offline.probe.texts import check_apart, read_texts, rendered


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return load_config(demo_model_path())[1]


def given(tmp_path: Path, name: str, content: str) -> Path:
    file = tmp_path / name
    file.write_text(content, encoding="utf-8")
    return file


def test_lines_are_what_a_user_says(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    texts = read_texts(given(tmp_path, "a.txt", "How are you?\r\n\n  Where is it? \n"))
    assert [text.where.rpartition(", ")[2] for text in texts] == ["line 1", "line 3"]
    expected = render_question(tokenizer, "Where is it?").token_ids
    assert rendered(tokenizer, texts[1]) == expected


def test_json_has_prompts_and_conversations(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    # A string of JSON may hold what other readers take for the end of a line.
    lines = [
        '{"prompt": "Once\u2028upon a time"}',
        '{"messages": [{"role": "user", "content": "Where is it?"}]}',
        '{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}',
    ]
    prompt, asked, answered = read_texts(given(tmp_path, "a.jsonl", "\n".join(lines)))
    assert rendered(tokenizer, prompt) == tuple(tokenizer("Once\u2028upon a time").input_ids)
    assert rendered(tokenizer, asked) == render_question(tokenizer, "Where is it?").token_ids
    # Nothing is opened after an answer.
    opened = tuple(tokenizer(tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}],
        tokenize=False,
        add_generation_prompt=True,
    ), add_special_tokens=False).input_ids)  # fmt: skip
    found = rendered(tokenizer, answered)
    assert found == opened[: len(found)]
    assert len(found) < len(opened)
    assert [text.answered for text in (prompt, asked, answered)] == [False, False, True]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "\n \n", "has no text"),
        ("a.txt", "one\ntwo\n\none\n", "line 4: the text of .*line 1 again"),
        ("a.jsonl", '{"prompt": "a"}\nhello', "line 2: text: Invalid JSON"),
        ("a.jsonl", '{"text": "a"}', "line 1: text: Extra inputs"),
        ("a.jsonl", '["a"]', "line 1: text: Input should be an object"),
        ("a.jsonl", "{}", "line 1: text: give either prompt or messages"),
        ("a.jsonl", '{"prompt": ""}', "line 1: prompt: String should have at least 1"),
        ("a.jsonl", '{"messages": []}', "line 1: messages: Tuple should have at least 1"),
        (
            "a.jsonl",
            '{"messages": [{"role": "tool", "content": "a"}]}',
            r"line 1: messages\.0\.role: Input should be 'system', 'user' or 'assistant'",
        ),
    ],
)
def test_bad_files_are_refused_by_their_line(
    name: str, content: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(EvaluationError, match=message):
        read_texts(given(tmp_path, name, content))


def test_a_text_is_of_one_kind(tmp_path: Path) -> None:
    one = read_texts(given(tmp_path, "a.txt", "same\nother"))
    two = read_texts(given(tmp_path, "b.txt", "another\nsame"))
    with pytest.raises(EvaluationError, match=r"b.txt, line 2: the text of .*a.txt, line 1"):
        check_apart(one, two)


@pytest.mark.parametrize(
    ("settings", "counts", "message"),
    [
        (ProbeSettings(), (9, 500), "--positive: 9 texts are too few; give 10"),
        (ProbeSettings(), (10, 196), "false-positive rate of 0.01 needs 197 texts at least"),
        (ProbeSettings(rates=(0.0,)), (10, 500), "rates must be between 0 and 1"),
        (ProbeSettings(rates=(1.5,)), (10, 500), "rates must be between 0 and 1"),
        (ProbeSettings(max_tokens=1), (10, 500), "--max-tokens must be at least 2"),
        (ProbeSettings(seed=-1), (10, 500), "--seed must be between 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(
    settings: ProbeSettings, counts: tuple[int, int], message: str
) -> None:
    ProbeSettings().check(10, 197)
    with pytest.raises(EvaluationError, match=message):
        settings.check(*counts)


TOLD = {
    "model": "m",
    "dtype": "float32",
    "chat_template_sha256": None,
    "positives": 60,
    "negatives": 300,
    "positives_sha256": "0" * 64,
    "negatives_sha256": "0" * 64,
}


def scores(seed: int, layers: int = 4) -> ProbeScores:
    """Noise at all layers but one."""
    rng = np.random.default_rng(seed)
    positive, negative = rng.normal(size=(layers, 60)), rng.normal(size=(layers, 300))
    positive[2] += 2.0
    return ProbeScores(tuple(range(5, 5 + layers)), positive, negative)


def test_the_layer_that_tells_apart_is_chosen_and_measured_on_other_texts() -> None:
    settings = ProbeSettings(rates=(0.05, 0.01), seed=3)
    found = measured(halved(scores(0), 3), settings, TOLD)
    assert (found.layer, found.rates) == (7, [0.01, 0.05])
    best = found.at(7)
    assert best is not None
    assert 0.8 < (best.low or 0.0) <= best.auroc <= (best.high or 1.0) < 1.0
    first, second = best.thresholds
    assert first.above > second.above
    assert second.true_positives > first.true_positives > 0.2
    assert second.false_positives_low <= 0.05 <= second.false_positives_high
    assert measured(halved(scores(0), 3), settings, TOLD) == found
    assert measured(halved(scores(0), 4), settings, TOLD) != found


def test_what_is_chosen_on_noise_is_not_reported_as_if_it_were_none() -> None:
    """The best of many layers of noise is above 0.5 where it was chosen, and not where it is measured."""
    rng = np.random.default_rng(5)
    best, everything = [], []
    for _ in range(12):
        noise = ProbeScores(tuple(range(6)), rng.normal(size=(6, 60)), rng.normal(size=(6, 200)))
        found = measured(halved(noise, 0), ProbeSettings(), TOLD)
        layer = found.at(found.layer)
        assert layer is not None
        best.append(layer.auroc)
        everything.append(auroc(noise.positive, noise.negative).max())
    assert abs(np.mean(best) - 0.5) < 0.03
    assert np.mean(everything) > 0.52
