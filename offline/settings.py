"""What an extraction may be told; the trust boundary of the pipeline."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field


class ExtractionSettings(BaseModel):
    """Everything that decides what is extracted from given prompts.

    Attributes:
        estimator: How a direction is learned from labelled hidden states.
        labels: ``soft`` for attention to the prefix (Eq. 4), ``hard`` for 1 and 0.
        token: ``attention`` to choose each block's token by attention (Eq. 3), or a negative index
            for the same token everywhere.
        candidate_tokens: Number of last tokens to choose among; None for those of the chat
            template's generation prompt and the one before.
        layers: Blocks to learn directions for; None for all but block 0.
        positive_count: Use only the first so many positive statements; None for all.
        negative_count: Likewise for the negative statements.
        batch_size: Prompts per forward pass.
        dtype: Dtype that the model runs in.
        seed: Seed of all randomness.
        rfm_ridge: Ridge of the recursive feature machine; the authors' is 1e-3.
        rfm_center_gradients: Whether its gradients are centred, as the authors do.
        rfm_iterations: Iterations of which the best is taken.
        rfm_bandwidths: Bandwidths of its kernel of which the best is taken.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    estimator: Literal["rfm", "mean_difference"] = "rfm"
    labels: Literal["soft", "hard"] = "soft"
    token: Literal["attention"] | Annotated[int, Field(lt=0)] = "attention"
    candidate_tokens: Annotated[int, Field(gt=0)] | None = None
    layers: tuple[Annotated[int, Field(ge=0)], ...] | None = Field(default=None, min_length=1)
    positive_count: Annotated[int, Field(gt=0)] | None = None
    negative_count: Annotated[int, Field(gt=0)] | None = None
    batch_size: int = Field(default=32, gt=0)
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    seed: int = 0
    rfm_ridge: float = Field(default=1e-3, gt=0, allow_inf_nan=False)
    rfm_center_gradients: bool = True
    rfm_iterations: int = Field(default=9, gt=0)
    rfm_bandwidths: tuple[Annotated[float, Field(gt=0, allow_inf_nan=False)], ...] = Field(
        default=(1.0, 10.0, 100.0), min_length=1
    )
