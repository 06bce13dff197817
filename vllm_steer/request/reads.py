"""Reads of a request: scores of directions in the residual stream, per token.

A score is the projection of the stream onto the direction's unit vector. Importing this module imports
neither torch nor vllm.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from vllm_steer.fields import LayerIndex, ThresholdName
from vllm_steer.operations import check_one_threshold
from vllm_steer.request.positions import Ranges

# Per request; reads of one direction with the same ``when`` share one probe.
MAX_READS = 64

Score = Annotated[float, Field(allow_inf_nan=False, ge=-1e9, le=1e9)]
Layers = Annotated[list[LayerIndex], Field(min_length=1, max_length=4096)]


class ReadChoice(BaseModel):
    """A direction that a request reads.

    Attributes:
        name: ``pack/direction``, or ``direction`` where only one loaded pack has it.
        layers: Layers to read, 0-based block outputs; the score is the mean over them. None takes the
            default layers of the direction.
        at: Token positions to read, with the same choices as ``positions`` but for token ids.
        when: ``before`` reads the block's output, ``after`` that output once the request's own directions
            have changed it.
        above: The receipt gives the share of an answer's scores that are greater.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    name: Annotated[str, Field(min_length=1, max_length=300)]
    layers: Layers | None = None
    at: Ranges = "generated"
    when: Literal["before", "after"] = "before"
    above: Score | None = None


class StopChoice(BaseModel):
    """When a probe ends an answer.

    Attributes:
        read: Index of the read in ``read``.
        above: Threshold that the score must exceed.
        at: Instead of ``above``, a measured threshold such as ``fpr=0.01``: that of this false-positive rate of the
            direction's probe, at the single layer read; if no layers are given, at the layer of that probe.
        for: Consecutive tokens that must exceed it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    read: Annotated[int, Field(ge=0, lt=MAX_READS)]
    above: Score | None = None
    at: ThresholdName | None = None
    tokens: Annotated[int, Field(ge=1, le=1024, alias="for")] = 1

    @model_validator(mode="after")
    def _has_one_threshold(self) -> StopChoice:
        check_one_threshold(self.above, self.at)
        return self
