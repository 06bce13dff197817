"""What a sweep asks of a pack: scales, prefixes, requests, and where each answer belongs."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from tests.unit.conftest import calibrated, make_pack, rewritten
from vllm_steer.cli import main
from vllm_steer.cli.prefixes import add_prefixes, given_prefixes
from vllm_steer.errors import EvaluationError
from vllm_steer.offline.evaluate.generation import Answer, Request
from vllm_steer.offline.evaluate.grids import Gaps
from vllm_steer.offline.evaluate.judges import Grade
from vllm_steer.offline.evaluate.scores import Measured
from vllm_steer.offline.evaluate.subjects import Selection, Subject, default_scales, subject_of
from vllm_steer.offline.questions.by_class import given_questions
from vllm_steer.packs.pack import Prefix, SteeringPack

QUESTIONS = given_questions(["t"], ["h", "i"], statements=False)
FEAR = Prefix(text="Fear spiders.", role="system")


@pytest.fixture
def pack(tmp_path: Path) -> SteeringPack:
    return make_pack(tmp_path / "fears", "fears", {"spiders": [1, 2], "heights": [1, 2]})


def subject(pack: SteeringPack, prefixes: dict[str, Prefix] | None = None) -> Subject:
    return subject_of(pack, QUESTIONS, Selection(scales=[8.0, -4.0]), prefixes)


def answered(requests: Sequence[Request]) -> list[Answer]:
    """Answers that say what was asked, each with a perplexity of its own."""
    return [
        Answer(
            f"{r.prefix.text if r.prefix else r.direction} {r.scale:g} {r.question}",
            True,
            2.0 + at,
            (at,),
        )
        for at, r in enumerate(requests)
    ]


def test_scales_of_a_pack_that_is_not_calibrated_surround_its_default(pack: SteeringPack) -> None:
    """The largest fluent scale that it gives was not measured by a calibration."""
    scales = default_scales(list(pack.directions.values()))
    assert scales == [1.0, 1.25, 1.5, 1.75, 2.0, 2.25, 2.5, 3.0]


def test_scales_of_a_calibrated_pack_go_a_little_beyond_the_largest_fluent(
    pack: SteeringPack,
) -> None:
    measured = {"calibration": calibrated()}
    both = rewritten(pack, spiders=measured, heights=measured | {"safe_scale": 16.0})
    scales = default_scales(list(both.directions.values()))
    assert scales == [1.0, 1.5, 2.0, 4.0, 8.0, 16.0, 20.0]
    assert subject_of(both, QUESTIONS).scales == tuple(scales)
    # One that fits no better than its default leaves nothing between.
    tight = rewritten(pack, spiders=measured | {"safe_scale": 2.0})
    assert default_scales([tight.directions["spiders"]]) == [1.0, 1.5, 2.0, 2.5]
    broken = rewritten(pack, spiders=measured | {"safe_scale": None}, heights=measured)
    assert default_scales([broken.directions["spiders"]])[-1] == 3.0


def test_prefixes_given_come_before_those_that_the_pack_knows(pack: SteeringPack) -> None:
    assert subject(pack).prefixes == {}
    knows = rewritten(pack, spiders={"prefix": FEAR})
    assert subject(knows).prefixes == {"spiders": FEAR}
    other = {"spiders": Prefix(text="Be afraid."), "heights": FEAR}
    assert subject(knows, other).prefixes == other


def test_floor_scales_and_ceiling_are_asked_and_judged_in_order(pack: SteeringPack) -> None:
    found = subject(rewritten(pack, heights={"prefix": FEAR}))
    requests = found.requests()
    assert len(requests) == 3 + 2 * 2 * 3 + 3
    assert requests[:3] == [Request(q) for q in "thi"]
    assert requests[3] == Request("t", "fears/spiders", -4.0)
    assert requests[-3:] == [Request(q, prefix=FEAR) for q in "thi"]
    answers = answered(requests)
    assert found.prefixed(answers) == [answers[-3:]]
    cases = list(found.cases(answers))
    assert [case.concept for case in cases] == [*["spiders"] * 3, *["heights"] * 3] * 3 + [
        "heights"
    ] * 3
    assert [case.answer for case in cases[3:6]] == [f"None 0 {q}" for q in "thi"]
    assert cases[9].answer == "fears/heights -4 t"
    assert cases[-1].answer == "Fear spiders. 0 i"


def measured(found: Subject, gaps: Gaps | None) -> Measured:
    answers = answered(found.requests())
    grades = [Grade(at / 100) for at, _ in enumerate(found.cases(answers))]
    return found.measured(answers, grades, gaps)


def test_every_figure_lands_at_its_concept_scale_and_question(pack: SteeringPack) -> None:
    gap = np.array([[np.nan] * 3, [10.0, 20.0, 40.0]])
    raised = np.stack([gap * 0.25, gap * 0.5])
    found = measured(subject(rewritten(pack, heights={"prefix": FEAR})), Gaps(gap, raised))
    grid = found.heldout
    assert grid.scales == (-4.0, 8.0)
    assert grid.unsteered.grades.tolist() == [[0.01, 0.02], [0.04, 0.05]]
    # Asked once for both concepts.
    assert grid.unsteered.perplexity.tolist() == [[3.0, 4.0]] * 2
    assert grid.answers[1].grades.tolist() == [[0.13, 0.14], [0.16, 0.17]]
    assert grid.answers[1].perplexity.tolist() == [[12.0, 13.0], [15.0, 16.0]]
    assert grid.prefixed.grades[1].tolist() == [0.19, 0.2]
    assert np.isnan(grid.prefixed.grades[0]).all()
    assert grid.known.tolist() == [False, True]
    assert grid.answers[1].raised[1].tolist() == [10.0, 20.0]
    assert grid.unsteered.raised[1].tolist() == [0.0, 0.0]
    assert grid.prefixed.raised[1].tolist() == grid.answers[0].gap[1].tolist() == [20.0, 40.0]
    assert found.tuning.answers[0].raised[1].tolist() == [2.5]


def test_without_prefix_or_gaps_nothing_is_known_of_them(pack: SteeringPack) -> None:
    found = measured(subject(pack), None)
    assert not found.heldout.known.any()
    assert np.isnan(found.single.raised).all()
    assert found.prefixed.grades.shape == (0, 2)


def parsed(*given: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_prefixes(parser, "For a test.")
    return parser.parse_args(given)


def test_prefixes_are_given_in_one_of_three_ways(tmp_path: Path) -> None:
    file = tmp_path / "prefixes.txt"
    file.write_text("spiders: Fear spiders.\n")
    names = ["spiders", "heights"]
    assert given_prefixes(parsed(), names) == {}
    given = parsed("--prefixes", str(file), "--prefix-role", "system")
    assert given_prefixes(given, names) == {"spiders": FEAR}
    by_class = given_prefixes(parsed(), names, "fears")
    assert by_class["heights"].text == "Personify someone who is terrified of heights."
    template = given_prefixes(parsed("--prefix", "Love {concept}."), names)
    assert template["spiders"] == Prefix(text="Love spiders.")
    with pytest.raises(EvaluationError, match="give only one of --prefixes"):
        given_prefixes(given, names, "fears")


def test_a_sweep_takes_the_prefixes_of_a_class_for_what_packs_do_not_know(
    pack: SteeringPack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Subject] = []

    class Stopped(Exception):
        pass

    def run(generator: object, subjects: list[Subject], *_: object) -> None:
        seen.extend(subjects)
        raise Stopped

    monkeypatch.setattr("vllm_steer.offline.evaluate.sweep.run_sweep", run)
    rewritten(pack, spiders={"prefix": FEAR})
    command = ["sweep", str(pack.path), "--model", "m", "--out", str(tmp_path), "--judge", "demo"]
    for more in ([], ["--class", "general"], ["--class", "fears"]):
        with pytest.raises(Stopped):
            main([*command, *more])
    assert [list(one.prefixes) for one in seen] == [
        ["spiders"],
        ["spiders"],
        ["spiders", "heights"],
    ]
    assert seen[2].prefixes["spiders"] == FEAR
    assert seen[2].prefixes["heights"].text.endswith("terrified of heights.")
