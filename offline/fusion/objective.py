"""The objective of a search: gold words in the answer, minus a part of its perplexity."""

from __future__ import annotations

import re

from vllm_steer.offline.evaluate.generation import Answer

OVERLAP_WEIGHT = 0.7
PERPLEXITY_WEIGHT = 0.3
# Perplexity beyond this gets the worst value.
WORST_PERPLEXITY = 100.0
# As in the authors' word tokenizer: "1.1", "o'clock" and "well-read" are one word, and so are "C++" and "C#".
_WORD = re.compile(r"\w+(?:(?:(?<=\d)[.,:](?=\d)|['’&/-](?=\w))\w+)*[+#]*")


def overlap(text: str, gold: str) -> float:
    """Returns the share of the gold answer's words, each counted once, that a text holds.

    The text is only the answer: an echo of the question would count for every answer.

    Args:
        text: The answer.
        gold: The gold answer; at least one word.
    """
    wanted = _words(gold)
    return len(wanted & _words(text)) / len(wanted)


def _words(text: str) -> set[str]:
    return set(_WORD.findall(text.lower()))


def objective(answer: Answer, gold: str) -> float:
    """Returns 0.7 overlap - 0.3 min(perplexity / 100, 1); an empty answer has the worst perplexity.

    Args:
        answer: The answer, with its perplexity under the unsteered model.
        gold: The gold answer.
    """
    perplexity = WORST_PERPLEXITY if answer.perplexity is None else answer.perplexity
    penalty = min(perplexity / WORST_PERPLEXITY, 1.0)
    return OVERLAP_WEIGHT * overlap(answer.text, gold) - PERPLEXITY_WEIGHT * penalty
