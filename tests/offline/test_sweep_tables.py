"""The Markdown of a sweep: floor, ceiling, gap, fluency and every concept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.offline.results_cases import class_result, given, sweep_result
from vllm_steer.errors import EvaluationError
from vllm_steer.offline.evaluate.results import read_result
from vllm_steer.offline.evaluate.tables import markdown, write_result


def row(text: str, start: str) -> list[str]:
    """Cells of the first line of a table that begins so."""
    line = next(line for line in text.splitlines() if line.startswith(f"| {start}"))
    return [cell.strip() for cell in line.strip("|").split(" | ")]


def test_the_classes_stand_between_floor_and_ceiling() -> None:
    text = markdown(sweep_result({"fears": "0" * 64}))
    cells = dict(zip(row(text, "class"), row(text, "fears"), strict=True))
    assert cells["ε"] == "8"
    assert cells["unsteered (floor)"] == "0.00 [0.00, 0.00] (1.5)"
    assert cells["one ε"] == "0.75 [0.38, 0.75] (20)"
    assert row(text, "fears")[5] == "0.50 [0.25, 0.50]"
    assert cells["prefixed (ceiling)"] == "0.95 [0.47, 0.95] (18)"
    assert "fluent: at most 0.05 more" in text
    assert "no more than 1.5 times" in text
    assert "repetition at most 0.15, perplexity at most 25):" in text


def test_the_curve_says_which_scales_are_fluent() -> None:
    text = markdown(sweep_result({"fears": "0" * 64}))
    assert row(text, "16") == ["16", "0.10 [0.05, 0.10]", "–", "400", "0.10", "no"]
    assert row(text, "8 |") == ["8", "0.75 [0.38, 0.75]", "0.50 [0.25, 0.50]", "9", "0.10", "yes"]


def test_every_concept_has_a_row() -> None:
    text = markdown(sweep_result({"fears": "0" * 64}))
    head, cells = row(text, "concept"), row(text, "spiders")
    assert dict(zip(head, cells, strict=True)) == {
        "concept": "spiders",
        "ε": "4",
        "unsteered": "0.05",
        "steered": "0.70",
        "prefixed": "0.90",
        "gap closed": "0.65 [0.40, 0.65]",
        "perplexity": "11",
        "repetition": "0.10",
    }
    assert r"| a \| b | 8, not fluent | 0.05 | 0.70 |" in text


def test_what_no_prefix_is_known_for_is_a_dash() -> None:
    result = sweep_result({"fears": "0" * 64})
    found = class_result("fears")
    concepts = [c.model_copy(update={"prefixed": None, "own": given(0.7)}) for c in found.concepts]
    unknown = found.model_copy(
        update={"prefixed": None, "concepts": concepts, "single": given(0.5), "fluent": False}
    )
    text = markdown(result.model_copy(update={"classes": [unknown], "prefixes": {}}))
    cells = row(text, "fears")
    assert (cells[2], cells[5], cells[9]) == ("8, not fluent", "–", "–")
    assert row(text, "spiders")[4:6] == ["–", "–"]


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["classes", 0, "ceiling"], 1.0, "classes.0.ceiling:"),
        (["classes", 0, "heldout", 1, "fluent"], "perhaps", "classes.0.heldout.1.fluent"),
        (["classes", 0, "single", "gap_closed"], float("nan"), "classes.0.single.gap_closed"),
        (["classes", 0, "concepts", 0, "prefixed"], 0.9, "classes.0.concepts.0.prefixed"),
    ],
)
def test_strange_results_are_refused(
    tmp_path: Path, path: list[str | int], value: object, message: str
) -> None:
    write_result(tmp_path, sweep_result({"fears": "0" * 64}))
    assert read_result(tmp_path / "sweep.json") == sweep_result({"fears": "0" * 64})
    content = json.loads((tmp_path / "sweep.json").read_text())
    place = content
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    (tmp_path / "sweep.json").write_text(json.dumps(content))
    with pytest.raises(EvaluationError, match=message):
        read_result(tmp_path / "sweep.json")
