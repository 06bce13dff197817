from __future__ import annotations

import pytest

from vllm_steer.errors import ExtractionError
from vllm_steer.offline.questions.everyday import LEAST, everyday_questions


def parts_of(questions) -> list[tuple[str, ...]]:
    return [questions.learned, questions.stopping, questions.tuning, questions.heldout]


def test_the_projects_own_are_many_distinct_and_each_of_one_part() -> None:
    parts = parts_of(everyday_questions())
    every = [question for part in parts for question in part]
    assert len(every) >= 400
    assert len({question.casefold() for question in every}) == len(every)
    assert all(question == question.strip() for question in every)
    assert all(len(part) >= LEAST for part in parts)


def test_the_parts_of_a_file_cover_it(tmp_path) -> None:
    lines = [f"Why is the number {number} odd?" for number in range(57)]
    file = tmp_path / "questions.txt"
    # Blank lines, outer space and what was there before count for nothing.
    file.write_text("\n\n".join(f"  {line} " for line in [*lines, *lines[:20]]))
    parts = parts_of(everyday_questions(file))
    assert [question for part in parts for question in part] == lines
    assert [len(part) for part in parts] == [34, 6, 6, 11]


def test_too_few_questions_are_refused_with_what_would_do(tmp_path) -> None:
    file = tmp_path / "few.txt"
    file.write_text("\n".join(["Why?", "How?"] * LEAST))
    message = (
        f"--questions: .*few.txt has 2 distinct questions; at least {LEAST} are needed, to learn"
    )
    with pytest.raises(ExtractionError, match=message):
        everyday_questions(file)
    with pytest.raises(ExtractionError, match="cannot read .*none.txt"):
        everyday_questions(tmp_path / "none.txt")
    file.write_text("\n".join(f"{number}?" for number in range(LEAST)))
    assert all(parts_of(everyday_questions(file)))
