"""The search of Fusion Steering, and what is made of its answers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from offline.demo.gold import gold_questions
from offline.fusion.evaluate import run_fusion, words_are_there
from offline.fusion.objective import objective, overlap
from offline.fusion.questions import GoldQuestion
from offline.fusion.references import direction_name
from offline.fusion.results import markdown
from offline.fusion.search import (
    Budget,
    FusionRequest,
    Target,
    best,
    search,
    segments_of,
)
from offline.generation import Answer, Generator, Request
from offline.token_engine import TokenEngine
from tests.random_pack import random_identity, write_random_pack
from vllm_steer.cli import main
from vllm_steer.errors import EvaluationError
from vllm_steer.pack import SteeringPack
from vllm_steer.request import parse

SEGMENTS = segments_of("segmented", 6)
BEST = (0.2, 0.7, 0.4)


def landscape(requests: Sequence[FusionRequest]) -> list[Answer]:
    """Answers whose objective falls with the distance of the scales from the best ones."""
    return [
        Answer("", True, 100 * float(np.abs(np.subtract(request.scales, BEST)).mean()))
        for request in requests
    ]


def targets(count: int) -> list[Target]:
    return [Target(f"question {i}", "gold", f"fusion/q{i}") for i in range(count)]


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("Webs and FANGS.", 0.5),
        ("webs, fangs; silk-legs", 1.0),
        ("cobwebs", 0.0),
        ("", 0.0),
    ],
)
def test_overlap_counts_whole_words_of_the_gold_answer(text: str, share: float) -> None:
    assert overlap(text, "webs, fangs, silk, legs") == share


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


def test_a_request_names_its_direction_once_for_each_segment() -> None:
    request = targets(1)[0].request(SEGMENTS, BEST)
    parsed = parse({"steering": request.steering()})
    assert parsed is not None
    assert [(c.name, c.scale, tuple(c.layers or ())) for c in parsed.directions] == [
        ("fusion/q0", scale, layers) for scale, layers in zip(BEST, SEGMENTS, strict=True)
    ]


def test_all_studies_go_on_in_one_batch_and_learn() -> None:
    batches: list[int] = []

    def ask(requests: Sequence[FusionRequest]) -> list[Answer]:
        batches.append(len(requests))
        return landscape(requests)

    studies = [[target] for target in targets(3)]
    found = search(ask, studies, SEGMENTS, Budget(60, 0.01, 1.0, seed=0))
    assert batches == [3] * 60
    for trials in found:
        assert len(trials) == 60
        drawn = np.mean([trial.value for trial in trials[:10]])
        learned = np.mean([trial.value for trial in trials[30:]])
        assert learned > drawn + 0.02
        assert best(trials).value == max(trial.value for trial in trials)
        assert all(0.01 <= scale <= 1.0 for trial in trials for scale in trial.scales)
    assert found[0][0].scales != found[1][0].scales, "every study has a seed of its own"
    again = search(ask, studies, SEGMENTS, Budget(60, 0.01, 1.0, seed=0))
    assert again == found


def test_questions_of_one_study_share_their_scales() -> None:
    (found,) = search(landscape, [targets(4)], SEGMENTS, Budget(3, 0.01, 1.0, seed=0))
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
        {direction_name(index): range(6) for index in range(6)},
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
        steered = isinstance(request, FusionRequest) and min(request.scales) > 0.5
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
    result = run_fusion(
        generator, pack, questions, tuning, ["full", "segmented"], budget, words_are_there(1.0)
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
        assert chosen.steering["directions"][0]["name"] == f"fusion/q{place}"
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
    with pytest.raises(EvaluationError, match="gets all 1 questions right"):
        run_fusion(generator, pack, questions[:1], tuning, ["full"], budget, right)
    with pytest.raises(EvaluationError, match="1 questions are reported and for tuning"):
        run_fusion(generator, pack, questions, questions[2:3], ["full"], budget, right)


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
