"""Questions with their gold answers, from JSON lines."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vllm_steer.errors import EvaluationError


class GoldQuestion(BaseModel):
    """A question whose answer is known.

    Attributes:
        question: The user's text.
        answer: The gold answer; overlap is counted with its words.
        explanation: What follows the answer in the reference text.
        reference_question: The user's text that the reference answer is read after; None for the
            question itself.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    question: str = Field(pattern=r"\S")
    answer: str = Field(pattern=r"\w")
    explanation: str = ""
    reference_question: str | None = Field(default=None, pattern=r"\S")

    @property
    def reference(self) -> str:
        """Answer and explanation, as the reference text has them."""
        return f"{self.answer}\n{self.explanation}" if self.explanation else self.answer


def read_questions(file: Path) -> list[GoldQuestion]:
    """Reads a file with one JSON object per line; empty lines are skipped.

    Raises:
        EvaluationError: It cannot be read, holds nothing, or a line is no question; the message
            names the line and the field.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise EvaluationError(f"cannot read {file}: {error}") from error
    questions = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            questions.append(GoldQuestion.model_validate_json(line))
        except ValidationError as error:
            fault = error.errors()[0]
            where = ".".join(map(str, fault["loc"])) or "line"
            raise EvaluationError(f"{file}, line {number}: {where}: {fault['msg']}") from error
    if not questions:
        raise EvaluationError(f"{file} holds no question")
    return questions
