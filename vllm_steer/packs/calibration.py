"""Calibration of a direction on its model: whether it steers, and its largest fluent scale.

``vllm-steer calibrate`` writes it into the manifest. Importing this module imports neither torch nor
vllm.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from pydantic import Field, model_validator

from vllm_steer.fields import Finite, Line, Positive, Record, Scale, Sha256, Share, is_ascending

PositiveFinite = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class CalibrationPoint(Record):
    """Measurements of a direction at one scale.

    Attributes:
        scale: Scale (ε).
        gap_closed: Share of the gap that it closed; None if no prefix is known.
        expression: How much of the concept its answers expressed; None if no prefix is known.
        repetition: Share of repeated word pairs within an answer; None if not measured.
        perplexity: Perplexity of the answers under the unsteered model; None if not measured.
        fluent: Whether the text counts as fluent; None if not measured.
    """

    scale: Scale
    gap_closed: Finite | None
    expression: Finite | None = None
    repetition: Share | None
    perplexity: PositiveFinite | None
    fluent: bool | None


class Calibration(Record):
    """Measurements of a direction at its default scale and on its default layers.

    Attributes:
        model: Name or path of the model.
        dtype: Data type that the model ran in.
        steers: Whether it closes a relevant share of the gap, beyond chance and more than another concept's
            vector, and its own answers express the concept.
        gap_closed: Share of the gap that it closes. The gap is the difference in likelihood of the prefixed
            model's answers between the plain and the prefixed prompt: 0 is no effect, 1 that of the prefix.
            None if no prefix is known that makes the model take on the concept; then only fluency was
            measured.
        low: Lower end of its 95 % interval over held-out questions; None if there is none.
        high: Upper end.
        control: Share of the gap that another concept's vector of the pack closes at its own scale;
            None in a pack without another concept.
        expression: How much of the concept its own answers express: how much likelier they are after the
            prefixed prompt than after the plain one, divided by the same for the prefixed model's answers.
            None if no prefix is known, and for ops that remove a component.
        repetition: Share of repeated word pairs within a steered answer; None if no answers were generated.
        repetition_prefixed: The same for the answers to the prefixed prompt.
        perplexity: Perplexity of the steered answers under the unsteered model; None if no answers were
            generated.
        fluent_dose: Raw dose of the direction at ``safe_scale`` on its default layers, which corresponds to a
            dose of 1. None if no safe scale was found, and for ops that neither add nor read, whose dose at
            that scale is known without it.
        questions: Number of held-out questions.
        questions_sha256: Digest of the questions.
        curve: Measurements at every scale that was tried, ascending by scale.
    """

    model: Line
    dtype: Line
    steers: bool
    gap_closed: Finite | None
    low: Finite | None
    high: Finite | None
    control: Finite | None
    expression: Finite | None = None
    repetition: Share | None
    repetition_prefixed: Share | None
    perplexity: PositiveFinite | None
    fluent_dose: Positive | None
    questions: int = Field(gt=0)
    questions_sha256: Sha256
    curve: list[CalibrationPoint] = Field(min_length=1, max_length=1000)

    @model_validator(mode="after")
    def _in_order(self) -> Calibration:
        if not is_ascending([point.scale for point in self.curve]):
            raise ValueError("curve must be ascending by scale, each scale once")
        if self.low is not None and self.high is not None and self.low > self.high:
            raise ValueError("low must not be greater than high")
        return self


def raw_dose(scale: float, lengths: Mapping[int, float], norms: Mapping[int, float]) -> float:
    """Returns the raw dose of adding ``scale`` times a vector: Σ|ε|·‖v‖/‖h‖ over its layers.

    Args:
        scale: ε.
        lengths: Euclidean length of the vector at each steered layer.
        norms: Norm of the residual stream by layer, for at least these layers.
    """
    return abs(scale) * sum(length / norms[layer] for layer, length in lengths.items())
