from __future__ import annotations

import json

import pytest

from vllm_steer.errors import EvaluationError, ExtractionError
from vllm_steer.offline.extract.inputs import (
    class_concepts,
    listed_concepts,
    prompt_files,
    read_settings,
    statement_sides,
    template_concepts,
    whole_prefixes,
)
from vllm_steer.offline.files import read_lines
from vllm_steer.offline.questions.statements import statements


@pytest.fixture
def lists(tmp_path):
    """A directory of concept lists and statements, as the benchmark of the paper is laid out."""
    files = {
        "fears.txt": "Spiders\nFlying\n Spiders \n",
        "moods.txt": "Calm\nflying",
        "personalities.txt": "Chef",
        "personas.txt": "Ada Lovelace\n\n",
        "places.txt": "São Tomé\nFlying",
        "statements_0.txt": "Rain is good.\nBread is round.",
        "statements_1.txt": "Roads are long.",
        "README.txt": "not a list",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path


def test_a_directory_gives_every_class_its_prefix_and_every_concept_a_name(lists):
    concepts = dict(listed_concepts(lists))
    assert concepts == {
        "Flying (fears)": "Personify someone who is terrified of flying.",
        "Spiders": "Personify someone who is terrified of spiders.",
        "Calm": "Take on a calm mood.",
        "flying": "Take on a flying mood.",
        "Chef": "Take on the role of an expert chef.",
        "Ada Lovelace": "Take on the role of Ada Lovelace.",
        "Flying (places)": "Personify someone who loves Flying.",
        "São Tomé": "Personify someone who loves São Tomé.",
    }
    with pytest.raises(ExtractionError, match="no concept lists in .*; it must hold one of fears"):
        listed_concepts(lists / "nowhere")


def test_statements_come_from_files_then_the_directory_then_the_project(lists):
    own = [statement.text for statement in statements("extract")]
    assert statement_sides(None, None, lists) == (
        ["Rain is good.", "Bread is round."],
        ["Roads are long."],
    )
    given = lists / "moods.txt"
    assert statement_sides(given, None, lists) == (["Calm", "flying"], ["Roads are long."])
    assert statement_sides(None, None, None) == (own[:200], own[200:])
    (lists / "statements_1.txt").unlink()
    assert statement_sides(None, None, lists)[1] == own[200:]


def test_concepts_take_a_class_a_template_or_a_whole_prefix(tmp_path):
    file = tmp_path / "concepts.txt"
    file.write_text("Rain\nSnow")
    assert class_concepts(file, "moods")[0] == ("Rain", "Take on a rain mood.")
    assert template_concepts(file, "Be {concept}!") == [("Rain", "Be Rain!"), ("Snow", "Be Snow!")]
    with pytest.raises(ExtractionError, match="--prefix must hold {concept}"):
        template_concepts(file, "Be kind.")
    file.write_text("kind: Be kind: always.\n\nterse : Say little.")
    assert whole_prefixes(file) == [("kind", "Be kind: always."), ("terse", "Say little.")]
    for wrong in ("no colon", ": no name", "no prefix: "):
        file.write_text(wrong)
        with pytest.raises(ExtractionError, match="must be 'name: whole prefix'"):
            whole_prefixes(file)


def test_files_that_cannot_be_read_are_named(tmp_path):
    (tmp_path / "latin.txt").write_bytes("São".encode("latin-1"))
    for name in ("none.txt", "latin.txt"):
        with pytest.raises(ExtractionError, match=f"cannot read .*{name}"):
            class_concepts(tmp_path / name, "fears")
        with pytest.raises(EvaluationError, match=f"cannot read .*{name}"):
            read_lines(tmp_path / name, EvaluationError)


def test_settings_come_from_a_file_and_flags_go_before_it(tmp_path):
    file = tmp_path / "settings.json"
    file.write_text(json.dumps({"estimator": "ridge", "seed": 3, "rfm_bandwidths": [1, 2]}))
    settings = read_settings(file, {"seed": 5})
    assert (settings.estimator, settings.seed, settings.rfm_bandwidths) == ("ridge", 5, (1.0, 2.0))
    for content, message in (
        ('{"estimater": "ridge"}', "estimater:"),
        ('{"estimator": "logistic"}', "settings: .*needs labels 'hard'"),
        ("{", "Invalid JSON"),
    ):
        file.write_text(content)
        with pytest.raises(ExtractionError, match=message):
            read_settings(file, {})
    with pytest.raises(ExtractionError, match="cannot read"):
        read_settings(tmp_path / "none.json", {})


TRAINED = ({}, {"estimator": "trained"}, {"learn_from": "answers"}, {"layers": [2]}, {"seed": 3},
           {"train_steps": 4, "dtype": "float32"}, {"prefix_role": "system"}, {"unit": False},
           {"answer_length": 9, "questions": 8, "stopping_questions": 4, "batch_size": 2})  # fmt: skip
GUIDED = ({"estimator": "rfm"}, {"labels": "hard"}, {"token": -1}, {"permutations": 0}, {"unit": True},
          {"learn_from": "prompts"}, {"estimator": "ridge", "learn_from": "answers"},
          {"learn_from": "answers", "answer_tokens": "weighted"})  # fmt: skip


@pytest.mark.parametrize(
    ("method", "given"),
    [
        *(("trained", given) for given in TRAINED),
        *(("attention_guided", given) for given in GUIDED),
    ],
    ids=str,
)
@pytest.mark.parametrize("from_file", [False, True], ids=["flags", "file"])
def test_the_method_follows_from_what_is_said(tmp_path, method, given, from_file):
    """Training, unless something is said that it does not do; by flags and in a file alike."""
    file = None
    if from_file:
        file = tmp_path / "settings.json"
        file.write_text(json.dumps(given))
    settings = read_settings(file, {} if from_file else given)
    assert settings.method == method
    assert (settings.estimator == "trained") is (method == "trained")
    for field, value in given.items():
        assert getattr(settings, field) == (tuple(value) if field == "layers" else value)


def test_pairs_mean_contrastive_addition_and_a_method_that_is_named_stays():
    assert read_settings(None, {}, pairs=True).method == "caa"
    assert read_settings(None, {"method": "trained"}, pairs=True).method == "trained"
    for method in ("angular", "attention_guided"):
        assert read_settings(None, {"method": method}).method == method


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"method": "trained", "estimator": "rfm"}, "method 'trained' takes estimator 'trained'"),
        ({"method": "trained", "learn_from": "prompts"}, "estimator 'trained' needs learn_from 'answers'"),
        ({"method": "trained", "answer_tokens": "weighted"}, "estimator 'trained' takes answer_tokens 'mean'"),
        ({"estimator": "trained", "learn_from": "prompts"}, "needs learn_from 'answers'"),
        ({"prefix_role": "system", "labels": "hard"}, "prefix_role 'system' needs learn_from 'answers'"),
        ({"answer_tokens": "attention"}, "answer_tokens 'attention' needs learn_from 'answers'"),
        ({"learn_from": "answers", "token": -1}, "takes answer_tokens in place of token"),
        ({"learn_from": "answers", "compat": True}, "learn_from 'answers' takes compat False"),
        ({"learn_from": "answers", "contrast": "concepts", "labels": "hard"}, "takes contrast 'nothing'"),
        ({"learn_from": "answers", "block_choice": "top_k", "block_count": 1}, "takes block_choice 'all'"),
        ({"learn_from": "answers", "estimator": "logistic"}, "estimator 'logistic' needs labels 'hard'"),
        ({"learn_from": "answers", "estimator": "rfm", "unit": False}, "gives unit vectors"),
        ({"method": "prompt_only", "learn_from": "answers"}, "'prompt_only' takes learn_from 'prompts'"),
        ({"questions": 7}, "questions:"),
        ({"train_rate": 0}, "train_rate:"),
        ({"answer_tokens": "all"}, "answer_tokens:"),
    ],
    ids=str,
)  # fmt: skip
def test_settings_that_do_not_go_together_are_one_line(given, message):
    with pytest.raises(ExtractionError) as failure:
        read_settings(None, given)
    told = str(failure.value)
    assert told.startswith("settings cannot be used: ")
    assert message in told
    assert "\n" not in told


def test_whole_prompts_come_from_files(tmp_path):
    for name, text in (("pirate", "\nYou are a pirate.\n\nSay arr.\n"), ("empty", " \n")):
        (tmp_path / f"{name}.txt").write_text(text)
    item = f"Jack Sparrow={tmp_path / 'pirate.txt'}"
    assert prompt_files([item]) == [("Jack Sparrow", "You are a pirate.\n\nSay arr.")]
    for wrong, message in (
        (
            ["pirate.txt"],
            "'pirate.txt' must be NAME=FILE, such as pirate=pirate.txt, each name once",
        ),
        ([f"={tmp_path / 'pirate.txt'}"], "must be NAME=FILE"),
        ([item, item], "each name once"),
        ([f"none={tmp_path / 'empty.txt'}"], "empty.txt is empty; it must hold the prompt"),
        ([f"none={tmp_path / 'none.txt'}"], "cannot read .*none.txt"),
    ):
        with pytest.raises(ExtractionError, match=message):
            prompt_files(wrong)
