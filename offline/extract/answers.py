"""Answers of the prefixed model, for learning directions and measuring strengths.

An answer to a question with the prefix is read, or made likely, after the same question without it.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from vllm_steer.offline.models.prompts import RenderedPrompt


@dataclass(frozen=True)
class Example:
    """One answer of the prefixed model, and the two prompts that it is read after.

    Attributes:
        plain: The question as a chat prompt, without the prefix.
        prefixed: The same question with it; the answer was generated after this one.
        answer: Token ids of the answer, greedy; its last is the one that ended it, where one did.
        log_likelihood: Of the answer after the prefixed prompt, natural logarithm.
    """

    plain: RenderedPrompt
    prefixed: RenderedPrompt
    answer: tuple[int, ...]
    log_likelihood: float


@dataclass(frozen=True)
class ConceptAnswers:
    """What one concept is learned from.

    Attributes:
        learned: Examples to learn from.
        stopping: Examples to other questions, which say when training stops.
    """

    learned: tuple[Example, ...]
    stopping: tuple[Example, ...]

    @cached_property
    def digest(self) -> str:
        """sha256 of prompts and answers, in hexadecimal."""
        content = [
            [e.plain.token_ids, e.prefixed.token_ids, e.answer]
            for e in (*self.learned, *self.stopping)
        ]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    @property
    def tokens_saved(self) -> int:
        """Tokens by which the plain prompt is shorter than the prefixed one, the median."""
        saved = [
            len(e.prefixed.token_ids) - len(e.plain.token_ids)
            for e in (*self.learned, *self.stopping)
        ]
        return int(np.median(saved))
