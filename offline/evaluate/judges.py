"""Judges of whether an answer expresses its concept."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from vllm_steer.errors import EvaluationError, choices
from vllm_steer.offline.questions.by_class import Question


@dataclass(frozen=True)
class Case:
    """One answer to judge.

    Attributes:
        concept_class: Class of the concept.
        concept: Name of the direction.
        question: The question.
        answer: The answer, without the prompt.
        finished: Whether it ended by itself.
        reference: What a right answer says; None where nothing is known.
    """

    concept_class: str
    concept: str
    question: Question
    answer: str
    finished: bool
    reference: str | None = None


@dataclass(frozen=True)
class Grade:
    """A judge's verdict.

    Attributes:
        value: 0 to 1; None where the judge failed.
        error: Why it failed; empty otherwise.
    """

    value: float | None
    error: str = ""


class Judge(Protocol):
    """The interface of a judge in a sweep."""

    @property
    def name(self) -> str:
        """Description written with the figures; includes everything that changes grades."""

    def grade(self, cases: Sequence[Case]) -> list[Grade]:
        """Grades every case, in order; a failure is a :class:`Grade` without a value."""


class KeywordJudge:
    """Grades 1 if enough distinct keywords of the concept occur, as whole words or stems, else 0.

    Args:
        keywords: Concept to keywords, which may be several words long; matched without case. One that
            ends in ``*`` is the beginning of a word.
        least: Number of keywords that must occur.
    """

    def __init__(self, keywords: Mapping[str, Sequence[str]], least: int = 1) -> None:
        self.name = f"keywords, at least {least}"
        self._least = least
        self._patterns = {
            concept: [_pattern(word) for word in set(words)] for concept, words in keywords.items()
        }

    @classmethod
    def of_names(cls, concepts: Sequence[str]) -> KeywordJudge:
        """A judge that looks for the concept's own name."""
        return cls({concept: [concept] for concept in concepts})

    @classmethod
    def of_lines(cls, lines: Sequence[str], least: int = 1) -> KeywordJudge:
        """A judge from lines ``concept: word, word``.

        Raises:
            EvaluationError: A line has no colon, no words, or fewer words than must occur.
        """
        keywords = {}
        for line in lines:
            concept, colon, rest = line.partition(":")
            words = {word.strip().lower() for word in rest.split(",") if word.strip(" *")}
            if not colon or len(words) < least:
                raise EvaluationError(
                    f'keywords: {line!r} must be "concept: word, word" with at least {least} words'
                )
            keywords[concept.strip()] = sorted(words)
        return cls(keywords, least)

    def grade(self, cases: Sequence[Case]) -> list[Grade]:
        """Grades all cases.

        Raises:
            EvaluationError: A concept has no keywords.
        """
        return [Grade(float(self._count(case) >= self._least)) for case in cases]

    def _count(self, case: Case) -> int:
        if case.concept not in self._patterns:
            raise EvaluationError(
                f"concept {case.concept!r} has no keywords; {choices(case.concept, self._patterns)}"
            )
        return sum(bool(pattern.search(case.answer)) for pattern in self._patterns[case.concept])


def _pattern(word: str) -> re.Pattern[str]:
    end = "" if word.endswith("*") else r"\b"
    return re.compile(rf"\b{re.escape(word.rstrip('*'))}{end}", re.IGNORECASE)
