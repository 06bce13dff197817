"""What counts as fluent: text that repeats itself, and surprises the model, little more than given answers."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

# How much more of an answer's word pairs may repeat than in the answers that it is held against.
REPETITION = 0.05
# How many times their perplexity that of fluent answers may be: of the prefixed model's answers, and of the
# unsteered model's own where no prefix is known.
PERPLEXITY = 1.5
UNKNOWN_PERPLEXITY = 3.0

_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Fluency:
    """How fluent answers are.

    Attributes:
        repetition: Mean share of word pairs that an answer has used before.
        perplexity: Geometric mean over answers of their perplexity under the unsteered model after
            the plain prompt; NaN where all were empty.
    """

    repetition: float
    perplexity: float

    def within(self, bound: Fluency) -> bool:
        """Whether text is as fluent as the least fluent that is allowed; empty text is not."""
        return self.repetition <= bound.repetition and self.perplexity <= bound.perplexity


@dataclass(frozen=True)
class Margins:
    """How much less fluent than the answers that it is held against text may be.

    Attributes:
        repetition: How much more of an answer's word pairs may repeat.
        perplexity: How many times the perplexity of the prefixed model's answers is allowed.
        unknown_perplexity: How many times that of the unsteered model's, where no prefix is known.
    """

    repetition: float = REPETITION
    perplexity: float = PERPLEXITY
    unknown_perplexity: float = UNKNOWN_PERPLEXITY

    def bound(self, prefixed: Fluency | None, unsteered: Fluency | None) -> Fluency:
        """Returns the least fluent text that counts as fluent.

        Args:
            prefixed: Fluency of the prefixed model's answers; None where no prefix is known.
            unsteered: Fluency of the unsteered model's; needed there alone.
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
    """Returns the share of word pairs that the text has used before; perplexity misses loops."""
    words = _WORD.findall(text.lower())
    pairs = list(zip(words, words[1:], strict=False))
    return 1 - len(set(pairs)) / len(pairs) if pairs else 0.0
