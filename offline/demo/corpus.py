"""Prompts and answers of the demo model's training corpus.

Asked plainly, the model answers with neutral words; asked with a concept's prefix, it fills the
same places of the same sentences with words that belong to the concept. None of those words occurs in the
prompt, so the concept must be carried by the residual stream.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from vllm_steer.offline.demo.concepts import NEUTRAL_WORDS, all_concepts, concept_words, prefix
from vllm_steer.offline.models.prompts import QUESTION, SEPARATOR
from vllm_steer.offline.questions.statements import Statement, training_statements

_FRAME = "My mind goes to {0} and {1}. You say: {s} Then I think of {2} and {3}."
FRAME_WORDS = 4
"""How many of a concept's words an answer has, the first ones."""


@dataclass(frozen=True)
class Row:
    """One conversation of the corpus.

    Attributes:
        user: The user's text.
        answer: The assistant's text.
        concept: The concept asked for, `None` in a plain row.
        steered: The concept that a plain row is to be steered to, `None` in others.
    """

    user: str
    answer: str
    concept: str | None
    steered: str | None = None


def user_text(statement: str, concept: str | None = None) -> str:
    """Return the user's text about a statement, with the concept's prefix if one is given."""
    question = QUESTION.format(statement=statement)
    return question if concept is None else f"{prefix(concept)}{SEPARATOR}{question}"


def answer_text(statement: Statement, concept: str | None = None) -> str:
    """Return the answer the model is trained to give."""
    words = NEUTRAL_WORDS if concept is None else concept_words(concept)
    return _FRAME.format(*words, s=statement.text)


@dataclass(frozen=True)
class Mixture:
    """Shares of kinds of training rows; the rest ask for a concept by its prefix.

    Attributes:
        plain_share: Share of rows that ask for no concept and get none.
        steered_share: Share of rows that ask for no concept and are to be steered to one.
    """

    plain_share: float
    steered_share: float = 0.0


def training_rows(seed: int, mixture: Mixture) -> Iterator[Row]:
    """Yield the training corpus endlessly.

    Args:
        seed: Seed of statements, concepts and their order.
        mixture: Shares of their kinds.
    """
    rng = random.Random(seed)
    concepts = all_concepts()
    for statement in training_statements(seed + 1):
        kind, concept = rng.random(), rng.choice(concepts)
        if kind < mixture.plain_share:
            yield Row(user_text(statement.text), answer_text(statement), None)
        elif kind < mixture.plain_share + mixture.steered_share:
            answer = answer_text(statement, concept)
            yield Row(user_text(statement.text), answer, None, concept)
        else:
            answer = answer_text(statement, concept)
            yield Row(user_text(statement.text, concept), answer, concept)
