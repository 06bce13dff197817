"""How strengths are measured."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from vllm_steer.offline.measures.fluency import PERPLEXITY, UNKNOWN_PERPLEXITY

# Wider than where more answers are asked: the mean of ten is not known more closely.
_REPETITION = 0.1


class CalibrationSettings(BaseModel):
    """How strengths are measured.

    Attributes:
        window_questions: Tuning questions that layers, and scales in steps of two, are chosen on.
        tuning_questions: Tuning questions that scales are chosen on.
        heldout_questions: Questions that are reported on.
        max_tokens: Longest answer.
        repetition: How much more of an answer's word pairs may repeat than in the prefixed model's
            answers.
        perplexity: How many times the perplexity of the prefixed model's answers under the unsteered
            model that of steered ones may be.
        unknown_perplexity: The same over the unsteered model's own answers, where no prefix is known.
        least: Least share of the gap that a direction closes, and of the concept that its answers
            express, to be said to steer.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    window_questions: int = Field(default=4, gt=0)
    tuning_questions: int = Field(default=10, gt=0)
    heldout_questions: int = Field(default=16, gt=0)
    max_tokens: int = Field(default=48, gt=0)
    repetition: float = Field(default=_REPETITION, ge=0)
    perplexity: float = Field(default=PERPLEXITY, ge=1)
    unknown_perplexity: float = Field(default=UNKNOWN_PERPLEXITY, ge=1)
    least: float = Field(default=0.1, ge=0)
