"""Exact judge of the demo model's answers."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from functools import cache

from vllm_steer.offline.demo.concepts import all_concepts, concept_words
from vllm_steer.offline.evaluate.judges import Case, Grade

MIN_WORDS = 2

_WORD = re.compile(r"[a-z]+")


@cache
def _owner() -> dict[str, str]:
    return {word: concept for concept in all_concepts() for word in concept_words(concept)}


def words_of(text: str) -> list[str]:
    """Return the lowercase words of a text, in order."""
    return _WORD.findall(text.lower())


def expressed_concept(answer: str) -> str | None:
    """Return the concept an answer expresses.

    An answer expresses a concept if it contains at least `MIN_WORDS` distinct words of the
    concept's own list and more of them than of any other concept's.

    Args:
        answer: The generated text, without the prompt.

    Returns:
        The concept, or `None` if no concept is expressed.
    """
    owner = _owner()
    ranked = Counter(owner[word] for word in set(words_of(answer)) if word in owner).most_common(2)
    if not ranked or ranked[0][1] < MIN_WORDS:
        return None
    if len(ranked) == 2 and ranked[0][1] == ranked[1][1]:
        return None
    return ranked[0][0]


def is_fluent(answer: str, statement: str, finished: bool = True) -> bool:
    """Tell whether an answer still answers and does not loop.

    Fluent means: generation ended by itself, the statement is repeated word for word exactly
    once, and outside the statement no two words in a row are the same, no pair of words occurs
    twice and no content word (a word of any concept) occurs twice.

    Args:
        answer: The generated text, without the prompt.
        statement: The statement the prompt asked about.
        finished: Whether generation ended with the end-of-answer token within its limit.
    """
    if not finished or answer.count(statement) != 1:
        return False
    before, after = answer.split(statement)
    words = [*words_of(before), "", *words_of(after)]
    content = [word for word in words if word in _owner()]
    pairs = list(zip(words, words[1:], strict=False))
    return (
        all(first != second for first, second in pairs)
        and len(set(pairs)) == len(pairs)
        and len(set(content)) == len(content)
    )


class DemoJudge:
    """The exact judge of the demo model: the concept is expressed, and the answer is fluent."""

    name = "demo"

    def grade(self, cases: Sequence[Case]) -> list[Grade]:
        """Grades 1 for a fluent answer in the concept's words, else 0."""
        return [
            Grade(
                float(
                    expressed_concept(case.answer) == case.concept
                    and is_fluent(case.answer, case.question.line, case.finished)
                )
            )
            for case in cases
        ]
