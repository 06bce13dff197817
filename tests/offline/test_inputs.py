from __future__ import annotations

import json

import pytest

from offline.demo.statements import statements
from offline.files import read_lines
from offline.inputs import (
    class_concepts,
    listed_concepts,
    read_settings,
    statement_sides,
    template_concepts,
    whole_prefixes,
)
from vllm_steer.errors import EvaluationError, ExtractionError


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
    assert read_settings(None, {}).estimator == "rfm"
    for content, message in (
        ('{"estimater": "ridge"}', "estimater: Extra inputs"),
        ('{"estimator": "logistic"}', "settings: .*needs labels 'hard'"),
        ("{", "Invalid JSON"),
    ):
        file.write_text(content)
        with pytest.raises(ExtractionError, match=message):
            read_settings(file, {})
    with pytest.raises(ExtractionError, match="cannot read"):
        read_settings(tmp_path / "none.json", {})
