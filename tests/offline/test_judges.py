"""What the judges say of given answers, and what language models' replies they accept."""

from __future__ import annotations

import pytest

from vllm_steer.errors import EvaluationError
from vllm_steer.offline.demo.corpus import answer_text
from vllm_steer.offline.demo.judge import DemoJudge
from vllm_steer.offline.evaluate.judges import Case, Grade, KeywordJudge
from vllm_steer.offline.evaluate.llm_judge import parse_reply
from vllm_steer.offline.evaluate.rubrics import RUBRICS
from vllm_steer.offline.questions.by_class import DEFAULTS, Question, given_questions, own_questions
from vllm_steer.offline.questions.statements import statements

STATEMENT = statements("heldout")[0]


def case(answer: str, concept: str = "spiders", finished: bool = True) -> Case:
    return Case("fears", concept, Question(STATEMENT.text, "asked"), answer, finished)


def test_the_demo_judge_wants_concept_and_fluency() -> None:
    good, neutral = answer_text(STATEMENT, "spiders"), answer_text(STATEMENT)
    cases = [
        case(good),
        case(good, "heights"),
        case(neutral),
        case(good, finished=False),
        case(good + " webs webs"),
    ]
    assert [grade.value for grade in DemoJudge().grade(cases)] == [1.0, 0.0, 0.0, 0.0, 0.0]


def test_keywords_are_whole_words_without_case() -> None:
    judge = KeywordJudge.of_lines(["spiders: web, spinning wheel, SILK"], least=2)
    texts = ["A Web of silk.", "A website of silk.", "web web web", "the spinning wheel, the web"]
    grades = judge.grade([case(text) for text in texts])
    assert [grade.value for grade in grades] == [1.0, 0.0, 0.0, 1.0]
    with pytest.raises(EvaluationError, match="'heights' has no keywords"):
        judge.grade([case("a", "heights")])
    names = KeywordJudge.of_names(["spiders"])
    assert [g.value for g in names.grade([case("Spiders!"), case("snakes")])] == [1.0, 0.0]


def test_a_star_ends_a_stem() -> None:
    judge = KeywordJudge.of_lines(["spiders: Terrif*, eight leg*"])
    texts = [
        "It terrifies me.",
        "Terrific!",
        "I terminate.",
        "unterrified",
        "Eight  legs",
        "eight legs",
    ]
    grades = judge.grade([case(text) for text in texts])
    assert [grade.value for grade in grades] == [1.0, 1.0, 0.0, 0.0, 0.0, 1.0]
    with pytest.raises(EvaluationError, match="at least 1 words"):
        KeywordJudge.of_lines(["spiders: *"])


@pytest.mark.parametrize("line", ["spiders", "spiders: web"])
def test_a_line_of_keywords_that_cannot_do(line: str) -> None:
    with pytest.raises(EvaluationError, match="at least 2 words"):
        KeywordJudge.of_lines([line], least=2)


@pytest.mark.parametrize(
    ("reply", "value"),
    [
        ("It is dread.\nGRADE: 1", 1.0),
        ("GRADE: 0.25\n\n", 0.25),
        ("GRADE:0", 0.0),
        ("GRADE: 1.0", 1.0),
    ],
)
def test_graded_replies(reply: str, value: float) -> None:
    assert parse_reply(reply, "graded") == Grade(value)


@pytest.mark.parametrize(
    "reply",
    ["", "1", "GRADE: 2", "GRADE: 1.5", "GRADE: 10", "GRADE: -1", "GRADE: yes", "GRADE: 1 or 0"]
    + ["GRADE: 1\nOr rather not.", "So GRADE: 1", "GRADE: nan"],
)
def test_other_replies_are_errors(reply: str) -> None:
    grade = parse_reply(reply, "graded")
    assert grade.value is None
    assert "GRADE" in grade.error


def test_yes_and_no() -> None:
    replies = ["Good.\nGRADE: yes", "GRADE: no", "GRADE: 1", "GRADE: maybe"]
    assert [parse_reply(r, "yes-no").value for r in replies] == [1.0, 0.0, None, None]


def test_every_class_has_questions_and_a_rubric() -> None:
    assert set(DEFAULTS) == set(RUBRICS)
    for name in DEFAULTS:
        own = own_questions(name)
        assert len(own.tuning) >= 2
        assert len(own.heldout) >= 4
        assert "{concept}" in RUBRICS[name]
        # What remains after the concept is filled in must be free of stray braces.
        assert "{" not in RUBRICS[name].replace("{concept}", "")
    assert own_questions("unheard-of") == own_questions("general")


def test_a_question_is_for_tuning_or_held_out() -> None:
    with pytest.raises(EvaluationError, match="such as 'b'; .* remove"):
        given_questions(["a", "b"], ["b", "c"], statements=False)
    with pytest.raises(EvaluationError, match="must be given"):
        given_questions([], ["b"], statements=False)
    (asked,) = given_questions(["Rain is good."], ["b"], statements=True).tuning
    assert asked.line == "Rain is good."
    assert asked.asked.endswith("Statement: Rain is good.")
