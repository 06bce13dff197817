"""The search of Fusion Steering, and what is made of its answers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from vllm_steer.cli import main
from vllm_steer.errors import EvaluationError
from vllm_steer.offline.demo.gold import gold_questions
from vllm_steer.offline.engine.tokens import TokenEngine
from vllm_steer.offline.evaluate.generation import Answer, Generator, Request
from vllm_steer.offline.fusion.evaluate import FusionQuestions, run_fusion, words_are_there
from vllm_steer.offline.fusion.objective import objective, overlap
from vllm_steer.offline.fusion.questions import GoldQuestion
from vllm_steer.offline.fusion.results import markdown
from vllm_steer.offline.fusion.search import (
    Budget,
    Case,
    FusionRequest,
    Target,
    best,
    cases_of,
    search,
    segments_of,
)
from vllm_steer.packs.pack import SteeringPack
from vllm_steer.request.schema import parse
from vllm_steer.testing.random_pack import random_identity, write_random_pack

BEST = (0.2, 0.4, 0.1)


def landscape(requests: Sequence[FusionRequest]) -> list[Answer]:
    """Answers whose objective falls with the distance of the scales from the best ones."""
    return [
        Answer("", True, 100 * float(np.abs(np.subtract(request.case.scales, BEST)).mean()))
        for request in requests
        if request.case
    ]


def trials_of(cases: Sequence[Case]) -> list[list[Target]]:
    return [[Target(f"question {c.question}", "gold", "fusion", c)] for c in cases]


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("Webs and FANGS.", 0.5),
        ("webs, fangs; silk and legs", 1.0),
        ("Webs webs silk-legs", 0.25),
        ("cobwebs", 0.0),
        ("", 0.0),
    ],
)
def test_overlap_counts_whole_words_of_the_gold_answer(text: str, share: float) -> None:
    assert overlap(text, "webs, fangs, silk, legs") == share


@pytest.mark.parametrize(
    ("text", "gold", "share"),
    [
        ("It opened on 1 May.", "1.1", 0.0),
        ("It is version 1.1.", "1.1", 1.0),
        ("the letter c", "C++", 0.0),
        ("They wrote it in C++, mostly.", "C++", 1.0),
        ("C", "C#", 0.0),
        ("At 10:30, for $1,000.", "10:30 1,000", 1.0),
        ("10 and 30", "10:30", 0.0),
        ("O’Brien", "o’brien", 1.0),
        ("He read well", "well-read", 0.0),
        ("the cat", "The cat and the dog", 0.5),
    ],
)
def test_overlap_counts_words_as_a_tokenizer_has_them_each_once(
    text: str, gold: str, share: float
) -> None:
    assert overlap(text, gold) == share


def test_objective() -> None:
    assert objective(Answer("webs", True, 20.0), "webs fangs") == pytest.approx(0.35 - 0.06)
    assert objective(Answer("webs fangs", True, 1e6), "webs fangs") == pytest.approx(0.4)
    assert objective(Answer("", True, None), "webs fangs") == pytest.approx(-0.3)


def test_segments_are_the_published_thirds() -> None:
    early, middle, late = segments_of("segmented", 26)
    assert (early, middle, late) == (
        tuple(range(9)),
        tuple(range(9, 18)),
        tuple(range(18, 26)),
    )
    assert segments_of("full", 26) == (tuple(range(26)),)
    with pytest.raises(EvaluationError, match="2 layers cannot be cut into 3"):
        segments_of("segmented", 2)


def test_scales_are_products_of_two_even_draws() -> None:
    """Whose mean is that of one squared; a single even draw has twice that."""
    drawn = np.array(Budget(20_000, 0.01, 1.0, seed=0).draw(3, study=1))
    assert drawn.shape == (20_000, 3)
    assert drawn.mean() == pytest.approx(0.505**2, abs=0.005)
    assert np.median(drawn) == pytest.approx(0.19, abs=0.01)
    assert 1e-4 <= drawn.min() < 0.001 < 0.98 < drawn.max() <= 1.0
    assert abs(np.corrcoef(drawn.T)[0, 1]) < 0.03
    few = Budget(5, 0.01, 1.0, seed=0)
    assert few.draw(3, 1) == few.draw(3, 1) != few.draw(3, 2)


def test_every_question_has_scales_of_its_own_and_those_of_the_others() -> None:
    cases = cases_of(3, 2, ["full", "segmented"], 6, Budget(4, 0.01, 1.0, seed=0))
    assert len({case.name for case in cases}) == len(cases) == 2 * 4 * (3 + 5)
    own = [case for case in cases if not case.common and case.kind == "segmented"]
    assert len({case.scales for case in own}) == len(own) == 12
    common = [case for case in cases if case.common and case.kind == "full"]
    assert {case.question for case in common} == set(range(5))
    for trial in range(4):
        assert len({case.scales for case in common if case.trial == trial}) == 1
    assert own[0].layer_scales == [scale for scale in own[0].scales for _ in range(2)]
    assert not [case for case in cases_of(3, 0, ["full"], 6, Budget(4, 0, 1, 0)) if case.common]


def test_a_request_names_the_direction_of_its_case_at_scale_1() -> None:
    (case,) = cases_of(1, 0, ["segmented"], 6, Budget(1, 0.01, 1.0, seed=0))
    request = Target("", "", "fusion", case).request
    parsed = parse({"steering": request.steering()})
    assert parsed is not None
    assert [(c.name, c.scale) for c in parsed.directions] == [(f"fusion/{case.name}", 1.0)]


def test_all_studies_are_asked_in_one_batch() -> None:
    batches: list[int] = []

    def ask(requests: Sequence[FusionRequest]) -> list[Answer]:
        batches.append(len(requests))
        return landscape(requests)

    cases = cases_of(3, 0, ["segmented"], 6, Budget(60, 0.01, 1.0, seed=0))
    studies = [trials_of([c for c in cases if c.question == place]) for place in range(3)]
    found = search(ask, studies)
    assert batches == [180]
    for trials, study in zip(found, studies, strict=True):
        assert [trial.scales for trial in trials] == [targets[0].case.scales for targets in study]
        distances = [np.abs(np.subtract(trial.scales, BEST)).mean() for trial in trials]
        assert best(trials) is trials[int(np.argmin(distances))]


def test_questions_of_one_study_share_their_scales() -> None:
    cases = cases_of(0, 4, ["segmented"], 6, Budget(3, 0.01, 1.0, seed=0))
    shared = [
        [target for (target,) in trials_of([c for c in cases if c.trial == trial])]
        for trial in range(3)
    ]
    (found,) = search(landscape, [shared])
    for trial in found:
        assert len(trial.answers) == 4
        assert trial.value == pytest.approx(-0.3 * np.abs(np.subtract(trial.scales, BEST)).mean())


@pytest.mark.parametrize("budget", [(0, 0.0, 1.0), (5, 1.0, 1.0)])
def test_budgets_without_trials_or_range_are_refused(budget: tuple[int, float, float]) -> None:
    with pytest.raises(EvaluationError, match="a search needs trials"):
        Budget(*budget, seed=0)


@pytest.fixture
def questions() -> list[GoldQuestion]:
    return gold_questions("heldout", 4, prefixed_reference=True)


@pytest.fixture
def tuning() -> list[GoldQuestion]:
    return gold_questions("tune", 2, prefixed_reference=True)


@pytest.fixture
def pack(tmp_path: Path) -> SteeringPack:
    return write_random_pack(
        tmp_path,
        "fusion",
        random_identity(hidden_size=8, num_layers=6),
        {"unused": range(6)},
        seed=0,
        default_scale=1.0,
        safe_scale=1.0,
        residual_norm=1.0,
    )


@pytest.fixture
def generator(
    monkeypatch: pytest.MonkeyPatch, pack: SteeringPack, questions: list[GoldQuestion]
) -> Generator:
    """Gives the first question's gold answer always, and any other where the scales are large."""

    def generate(self: Generator, requests: Sequence[Request]) -> list[Answer]:
        return [_answer(request) for request in requests]

    def _answer(request: Request) -> Answer:
        steered = isinstance(request, FusionRequest) and min(request.case.scales) > 0.2
        if request.question == questions[0].question:
            return Answer(questions[0].answer, True, 1.0)
        gold = {q.question: q.answer for q in gold_questions("heldout", 4, True)}
        gold |= {q.question: q.answer for q in gold_questions("tune", 2, True)}
        return Answer(gold[request.question] if steered else "reasons", True, 4.0)

    monkeypatch.setattr(Generator, "answer", generate)
    return Generator(TokenEngine("demo", [pack], bar=False), 48)


def test_what_is_right_unsteered_is_left_out(
    generator: Generator,
    pack: SteeringPack,
    questions: list[GoldQuestion],
    tuning: list[GoldQuestion],
) -> None:
    budget = Budget(12, 0.01, 1.0, seed=0)
    cases = cases_of(4, 2, ["full", "segmented"], 6, budget)
    result = run_fusion(
        generator, pack, FusionQuestions(questions, tuning), cases, budget, words_are_there(1.0)
    )
    assert (result.questions, result.wrong, result.tuning_questions) == (4, 3, 2)
    assert result.unsteered.right.mean == 0.0
    assert result.unsteered.overlap.mean == 0.0
    full = result.arms["full"]
    assert full.figures.right.mean == 1.0
    assert full.figures.perplexity == pytest.approx(4.0)
    assert full.answers_per_question == 12
    shares = [figures.right.mean for figures in full.by_trials]
    assert shares == sorted(shares)
    assert shares[0] < 1.0
    assert [chosen.question for chosen in full.chosen] == [q.question for q in questions[1:]]
    for place, chosen in enumerate(full.chosen, start=1):
        assert chosen.steering is not None
        (direction,) = chosen.steering["directions"]
        assert direction["name"].startswith(f"fusion/q{place} full ")
        assert direction["scale"] == 1.0
    common = result.arms["full, scales of other questions"]
    assert common.figures.right.mean == 1.0
    assert len({tuple(chosen.scales or ()) for chosen in common.chosen}) == 1
    assert "| full | 1.00 | 1.00 | 4 | 12 |" in markdown(result)


def test_nothing_wrong_and_mixed_questions_are_refused(
    generator: Generator,
    pack: SteeringPack,
    questions: list[GoldQuestion],
    tuning: list[GoldQuestion],
) -> None:
    budget, right = Budget(2, 0.01, 1.0, seed=0), words_are_there(1.0)
    cases = cases_of(4, 2, ["full"], 6, budget)
    with pytest.raises(EvaluationError, match="gets all 1 questions right"):
        run_fusion(generator, pack, FusionQuestions(questions[:1], tuning), cases, budget, right)
    with pytest.raises(EvaluationError, match="1 questions are both reported and for tuning"):
        run_fusion(
            generator, pack, FusionQuestions(questions, questions[2:3]), cases, budget, right
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--questions", "nowhere.jsonl"], "cannot read nowhere.jsonl"),
        (["--tuning-questions", "nowhere.jsonl"], "cannot read nowhere.jsonl"),
        (["--trials", "0"], "a search needs trials"),
        (["--low", "2"], "from 2 to 1"),
    ],
)
def test_faulty_commands_are_one_line_and_status_1(
    tmp_path: Path,
    questions: list[GoldQuestion],
    change: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "questions.jsonl"
    file.write_text("\n".join(question.model_dump_json() for question in questions))
    command = ["fusion", "--model", "no-model", "--questions", str(file)]
    assert main([*command, "--out", str(tmp_path / "out"), *change]) == 1
    shown = capsys.readouterr().err
    assert message in shown
    assert shown.count("\n") == 1
