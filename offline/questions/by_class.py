"""Questions that steered models are asked: built-in ones by class, or from plain text files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from vllm_steer.errors import EvaluationError
from vllm_steer.offline.models.prompts import QUESTION

GENERAL = "general"
TUNING_COUNT = 2

_TABLE: dict[str, str] = {
    "fears": (
        "What keeps you awake at night?|Which room would you rather not enter?|"
        "What made your heart race most recently?|What do you look for before you go to bed?|"
        "Which film could you never watch to its end?|What would you ask a friend to take away?"
    ),
    "moods": (
        "Describe this morning.|What does the week ahead look like?|"
        "How was your lunch?|What do you see when you look out of the window?|"
        "Write a short note to a neighbour.|What do you make of the weather?"
    ),
    "experts": (
        "What did you do at work this week?|Give me one piece of advice.|"
        "Which problem would you most like to solve?|Which book should I read next?|"
        "What do most people get wrong?|Explain something that fascinates you."
    ),
    "personas": (
        "Please introduce yourself.|What do you carry with you?|"
        "Where do you live?|What are you proud of?|"
        "Who are your friends and enemies?|Describe an ordinary day of yours."
    ),
    "places": (
        "Where should I travel next?|What would you like to eat tonight?|"
        "Describe a perfect weekend.|What does home look like to you?|"
        "Which street would you walk down now?|Which sound do you miss most?"
    ),
    GENERAL: (
        "Tell me something about yourself.|What is on your mind?|"
        "What would you do with a free day?|What should I know about the world?|"
        "What do you like best?|Give me some advice."
    ),
}


@dataclass(frozen=True)
class Question:
    """A question.

    Attributes:
        line: The line in its file.
        asked: The user's text.
    """

    line: str
    asked: str


@dataclass(frozen=True)
class QuestionSet:
    """Questions to choose a scale on, and others to report on."""

    tuning: tuple[Question, ...]
    heldout: tuple[Question, ...]

    def __post_init__(self) -> None:
        if not self.tuning or not self.heldout:
            raise EvaluationError("both tuning questions and held-out questions must be given")
        both = {q.asked for q in self.tuning} & {q.asked for q in self.heldout}
        if both:
            raise EvaluationError(
                f"{len(both)} questions are tuning and held-out at once, such as {min(both)!r}; "
                f"figures on questions that the scale was chosen on mean little: remove them"
            )


def own_questions(concept_class: str) -> QuestionSet:
    """Returns the built-in questions of a class; general ones if it is unknown."""
    lines = DEFAULTS.get(concept_class, DEFAULTS[GENERAL])
    asked = [Question(line, f"{line} Answer in one or two sentences.") for line in lines]
    return QuestionSet(tuple(asked[:TUNING_COUNT]), tuple(asked[TUNING_COUNT:]))


def given_questions(tuning: Sequence[str], heldout: Sequence[str], statements: bool) -> QuestionSet:
    """Returns questions from lines.

    Args:
        tuning: Lines to choose a scale on.
        heldout: Lines to report on.
        statements: Whether the lines are statements, to be asked about as in extraction.
    """

    def build(lines: Sequence[str]) -> tuple[Question, ...]:
        return tuple(
            Question(line, QUESTION.format(statement=line) if statements else line)
            for line in dict.fromkeys(lines)
        )

    return QuestionSet(build(tuning), build(heldout))


DEFAULTS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {name: tuple(lines.split("|")) for name, lines in _TABLE.items()}
)
"""Class to lines; the first ``TUNING_COUNT`` are for tuning."""
