"""What directions are trained on: prompts and answers as token ids."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

Tokens = tuple[int, ...]


class Example(Protocol):
    """Anything that an objective takes a loss of."""

    @property
    def tokens(self) -> int:
        """Tokens of its answers, which losses per token are divided by."""


E = TypeVar("E", bound=Example)


@dataclass(frozen=True)
class Answered:
    """A prompt with an answer that is to become likely.

    Attributes:
        prompt: The prompt that steering acts on.
        answer: The answer.
        prefixed: The prompt that the answer was given to, of which the gap is measured; None for none.
    """

    prompt: Tokens
    answer: Tokens
    prefixed: Tokens | None = None

    @property
    def tokens(self) -> int:
        return len(self.answer)


@dataclass(frozen=True)
class Preference:
    """A prompt with an answer that shows a behaviour and one that does not.

    Attributes:
        prompt: The prompt.
        positive: The answer that shows it.
        negative: The other one.
    """

    prompt: Tokens
    positive: Tokens
    negative: Tokens

    @property
    def tokens(self) -> int:
        return len(self.positive) + len(self.negative)


@dataclass(frozen=True)
class Contrast:
    """A prompt with and without a concept, and what is answered to each.

    Attributes:
        prompt: The prompt without it.
        prefixed: The prompt with it.
        negative: Answer to the one without.
        positive: Answer to the one with it.
    """

    prompt: Tokens
    prefixed: Tokens
    negative: Tokens
    positive: Tokens

    @property
    def tokens(self) -> int:
        return len(self.positive) + len(self.negative)


@dataclass(frozen=True)
class Row(Generic[E]):
    """An example of a step, and what it is a part of.

    Attributes:
        lesson: Number of the lesson that it belongs to.
        example: The example.
        tokens: Answer tokens of all examples that the lesson has in this step.
        examples: Number of these examples.
    """

    lesson: int
    example: E
    tokens: int
    examples: int
