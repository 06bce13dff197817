"""Settings of a calibration."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from vllm_steer.offline.measures.fluency import PERPLEXITY, UNKNOWN_PERPLEXITY

# Wider than with more answers, since a mean of ten is less precise.
_REPETITION = 0.1


class CalibrationSettings(BaseModel):
    """Settings of a calibration.

    Attributes:
        window_questions: Number of tuning questions for choosing layers, and scales in steps of two.
        tuning_questions: Number of tuning questions for choosing scales.
        heldout_questions: Number of questions to report on.
        max_tokens: Longest answer.
        repetition: Allowed excess of an answer's share of repeated word pairs over the prefixed model's
            answers.
        perplexity: Allowed ratio of the perplexity of steered answers under the unsteered model to that of
            the prefixed model's answers.
        unknown_perplexity: The same relative to the unsteered model's answers, if no prefix is known.
        least: Smallest share of the gap closed, and of the concept expressed, for a direction to count as
            steering.
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
