"""Calibration of a direction on its model: whether it steers, and how strong it may be.

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
    """What a direction did at one scale.

    Attributes:
        scale: Scale (ε).
        gap_closed: Share of the gap that it closed; None where no prefix is known that would.
        expression: How much of the concept its answers expressed; None likewise.
        repetition: Share of word pairs that repeat within an answer; None where it was not measured.
        perplexity: Perplexity of the answers under the unsteered model; None likewise.
        fluent: Whether the text counts as fluent; None likewise.
    """

    scale: Scale
    gap_closed: Finite | None
    expression: Finite | None = None
    repetition: Share | None
    perplexity: PositiveFinite | None
    fluent: bool | None


class Calibration(Record):
    """What was measured of a direction, at its default scale and on its default layers.

    Attributes:
        model: Name or path of the model that it was measured on.
        dtype: Data type that the model ran in.
        steers: Whether it closes a share of the gap that is worth having, not by chance, and more than
            another concept's vector does, and its own answers express the concept.
        gap_closed: Share of the gap that it closes. The gap lies between how likely the answers to
            the prefixed prompt are after the plain prompt and after the prefixed one: 0 is no effect,
            1 that of the prefix. None where no prefix is known that makes the model take on the
            concept; then only the text's fluency was measured.
        low: Lower end of its 95 % interval over held-out questions; None where there is none.
        high: Upper end.
        control: Share of the gap that another concept's vector of the pack closes at its own scale;
            None in a pack without another concept.
        expression: How much of the concept its own answers express: how much likelier they are after
            the prefixed prompt than after the plain one, over the same of the prefixed model's
            answers. None where no prefix is known, and for what is taken away.
        repetition: Share of word pairs that repeat within a steered answer; None where no answers
            were generated.
        repetition_prefixed: The same of the answers to the prefixed prompt.
        perplexity: Perplexity of the steered answers under the unsteered model; None likewise.
        fluent_dose: Raw dose of the direction at ``safe_scale`` on its default layers: what a dose
            of 1 means for it. None where no safe scale was found, and for ops that neither add nor
            read, whose dose at that scale is known without it.
        questions: Number of held-out questions.
        questions_sha256: Digest of the questions.
        curve: What every scale that was tried did, ascending by scale.
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
        lengths: Euclidean length of the vector at each layer that is steered.
        norms: Norm of the residual stream by layer, for these layers at least.
    """
    return abs(scale) * sum(length / norms[layer] for layer, length in lengths.items())
