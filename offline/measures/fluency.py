"""Fluency: text counts as fluent if its repetition and perplexity are close to those of reference answers."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

# Allowed excess of an answer's share of repeated word pairs over the reference answers.
REPETITION = 0.05
# Allowed ratio of perplexities to the prefixed model's answers, and to the unsteered model's if no prefix is
# known.
PERPLEXITY = 1.5
UNKNOWN_PERPLEXITY = 3.0

_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Fluency:
    """The fluency of answers.

    Attributes:
        repetition: Mean share of an answer's repeated word pairs.
        perplexity: Geometric mean over answers of their perplexity under the unsteered model after
            the plain prompt; NaN where all were empty.
    """

    repetition: float
    perplexity: float

    def within(self, bound: Fluency) -> bool:
        """Whether text is at least as fluent as a bound; empty text is not."""
        return self.repetition <= bound.repetition and self.perplexity <= bound.perplexity


@dataclass(frozen=True)
class Margins:
    """Allowed loss of fluency relative to the reference answers.

    Attributes:
        repetition: Allowed excess of the share of repeated word pairs.
        perplexity: Allowed ratio to the perplexity of the prefixed model's answers.
        unknown_perplexity: Allowed ratio to that of the unsteered model's, if no prefix is known.
    """

    repetition: float = REPETITION
    perplexity: float = PERPLEXITY
    unknown_perplexity: float = UNKNOWN_PERPLEXITY

    def bound(self, prefixed: Fluency | None, unsteered: Fluency | None) -> Fluency:
        """Returns the bound of fluent text.

        Args:
            prefixed: Fluency of the prefixed model's answers; None where no prefix is known.
            unsteered: Fluency of the unsteered model's; needed only then.
        """
        given, factor = (prefixed, self.perplexity)
        if given is None:
            given, factor = unsteered, self.unknown_perplexity
        assert given is not None
        return Fluency(given.repetition + self.repetition, factor * given.perplexity)


def joint(parts: Sequence[Fluency]) -> Fluency:
    """Returns the fluency of several concepts' answers together, or the bound of it."""
    count = len(parts)
    return Fluency(
        sum(part.repetition for part in parts) / count,
        math.exp(sum(math.log(part.perplexity) for part in parts) / count),
    )


def repetition(text: str) -> float:
    """Returns the share of repeated word pairs in a text; perplexity misses loops."""
    words = _WORD.findall(text.lower())
    pairs = list(zip(words, words[1:], strict=False))
    return 1 - len(set(pairs)) / len(pairs) if pairs else 0.0
