"""Prompts and answers of the demo model's training corpus.

Asked plainly, the model answers with neutral words; asked with a concept's prefix, it fills the
same places of the same sentences with words that belong to the concept. None of those words
occurs in the prompt, so the concept has to travel in the residual stream.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from offline.demo.concepts import NEUTRAL_WORDS, all_concepts, concept_words, prefix
from offline.demo.statements import Statement, training_statements
from offline.prompts import QUESTION, SEPARATOR

_FRAME = "My mind goes to {0} and {1}. You say: {s} Then I think of {2} and {3}."


@dataclass(frozen=True)
class Row:
    """One conversation of the corpus.

    Attributes:
        user: The user's text.
        answer: The assistant's text.
        concept: The concept asked for, `None` in a plain row.
    """

    user: str
    answer: str
    concept: str | None


def user_text(statement: str, concept: str | None = None) -> str:
    """Return the user's text about a statement, with the concept's prefix if one is given."""
    question = QUESTION.format(statement=statement)
    return question if concept is None else f"{prefix(concept)}{SEPARATOR}{question}"


def answer_text(statement: Statement, concept: str | None = None) -> str:
    """Return the answer the model is trained to give."""
    words = NEUTRAL_WORDS if concept is None else concept_words(concept)
    return _FRAME.format(*words, s=statement.text)


def training_rows(seed: int, plain_share: float) -> Iterator[Row]:
    """Yield the training corpus, without end.

    Args:
        seed: Seed of statements, concepts and their order.
        plain_share: Share of rows that ask for no concept.
    """
    rng = random.Random(seed)
    concepts = all_concepts()
    for statement in training_statements(seed + 1):
        concept = None if rng.random() < plain_share else rng.choice(concepts)
        yield Row(
            user=user_text(statement.text, concept),
            answer=answer_text(statement, concept),
            concept=concept,
        )
