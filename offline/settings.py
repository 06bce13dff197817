"""What an extraction may be told; the trust boundary of the pipeline."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from offline.methods import METHODS


class ExtractionSettings(BaseModel):
    """Everything that decides what is extracted from given prompts.

    Attributes:
        method: A key of ``offline.methods.METHODS``; it fixes some of the other settings and has
            defaults of its own for more.
        estimator: How a direction is learned from labelled hidden states.
        labels: ``soft`` for attention to the prefix (Eq. 4), ``hard`` for 1 and 0.
        token: ``attention`` to choose each block's token by attention (Eq. 3), or a negative index
            for the same token everywhere.
        contrast: What the negative statements are asked with: ``nothing``, or by turns the prefixes of
            all ``concepts`` that are extracted together, so that a direction holds what tells its
            concept from the others and not what every prefix brings; labels must be hard.
        held_out: Whether a fifth of the prompts is left out of the fit and validates it; the
            differences of means alone can do without.
        unit: Whether directions have length 1; else a difference of means keeps its own.
        token_statistic: Whether a token's attention is its ``max`` over prompts, as in Eq. 3, or its
            ``mean``.
        candidate_tokens: Number of last tokens to choose among; None for those of the chat
            template's generation prompt and the one before.
        layers: Blocks to learn directions for, or to choose them among; None for all but block 0.
        block_choice: ``all``; ``top_k`` or ``bottom_k`` of the enrichment score; or all that reach
            a ``threshold`` of it.
        block_count: k.
        block_threshold: The threshold, between 0 and 1.
        permutations: Random subsets of the enrichment test; 0 for no test.
        positive_count: Use only the first so many positive statements; None for all.
        negative_count: Likewise for the negative statements.
        paired: Whether every statement is asked with and without the prefix, so that the two kinds
            of prompts differ in nothing else.
        compat: Whether to do what the authors' code does where a better choice is the default:
            tokens are chosen on every other statement of both sides, not on the prompts learned
            from; the last block's state is taken after the final norm, though steering adds before
            it; ridge and logistic regression see raw rows without intercept, not rows of unit norm
            that are centred.
        batch_size: Prompts per forward pass.
        attention: ``auto`` for the fastest way that gives the numbers of eager attention on the
            model at hand, or ``eager``.
        dtype: Dtype that the model runs in.
        seed: Seed of all randomness.
        rfm_ridge: Ridge of the recursive feature machine; the authors' is 1e-3.
        rfm_center_gradients: Whether its gradients are centred, as the authors do.
        rfm_iterations: Iterations of which the best is taken.
        rfm_bandwidths: Bandwidths of its kernel of which the best is taken.
        rfm_solver: ``xrfm``, the exact ``gram`` form, or ``auto`` for the faster of the two.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: Literal["attention_guided", "caa", "ablation", "angular", "prompt_only"] = (
        "attention_guided"
    )
    estimator: Literal[
        "rfm", "ridge", "logistic", "pca", "mean_difference", "unit_mean_difference"
    ] = "rfm"
    labels: Literal["soft", "hard"] = "soft"
    token: Literal["attention"] | Annotated[int, Field(lt=0)] = "attention"
    contrast: Literal["nothing", "concepts"] = "nothing"
    held_out: bool = True
    unit: bool = True
    token_statistic: Literal["max", "mean"] = "max"
    candidate_tokens: Annotated[int, Field(gt=0)] | None = None
    layers: tuple[Annotated[int, Field(ge=0)], ...] | None = Field(default=None, min_length=1)
    block_choice: Literal["all", "top_k", "bottom_k", "threshold"] = "all"
    block_count: Annotated[int, Field(gt=0)] | None = None
    block_threshold: Annotated[float, Field(ge=0, le=1)] | None = None
    permutations: int = Field(default=999, ge=0)
    positive_count: Annotated[int, Field(gt=0)] | None = None
    negative_count: Annotated[int, Field(gt=0)] | None = None
    paired: bool = False
    compat: bool = False
    batch_size: int = Field(default=32, gt=0)
    attention: Literal["auto", "eager"] = "auto"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    seed: int = Field(default=0, ge=0)
    rfm_ridge: float = Field(default=1e-3, gt=0, allow_inf_nan=False)
    rfm_center_gradients: bool = True
    rfm_iterations: int = Field(default=9, gt=0)
    rfm_bandwidths: tuple[Annotated[float, Field(gt=0, allow_inf_nan=False)], ...] = Field(
        default=(1.0, 10.0, 100.0), min_length=1
    )
    rfm_solver: Literal["auto", "xrfm", "gram"] = "auto"

    @model_validator(mode="before")
    @classmethod
    def _of_method(cls, given: Any) -> Any:
        method = METHODS.get(str(given.get("method"))) if isinstance(given, dict) else None
        return {**method.fixed, **method.defaults, **given} if method else given

    @model_validator(mode="after")
    def _consistent(self) -> ExtractionSettings:
        if self.contrast == "concepts" and self.labels == "soft":
            raise ValueError("contrast 'concepts' needs labels 'hard'")
        method = METHODS[self.method]
        for field, value in method.fixed.items():
            if getattr(self, field) != value:
                raise ValueError(f"method {self.method!r} takes {field} {value!r}")
        if method.fixed and self.token == "attention":
            raise ValueError(f"method {self.method!r} takes a fixed token, such as -1")
        if not (self.held_out and self.unit) and not self.estimator.endswith("mean_difference"):
            raise ValueError(
                f"estimator {self.estimator!r} needs held-out prompts and gives unit vectors"
            )
        if self.estimator == "logistic" and self.labels == "soft":
            raise ValueError("estimator 'logistic' needs labels 'hard'")
        wanted = {"top_k": "block_count", "bottom_k": "block_count", "threshold": "block_threshold"}
        needed = wanted.get(self.block_choice)
        for field in ("block_count", "block_threshold"):
            if (getattr(self, field) is not None) != (field == needed):
                raise ValueError(
                    f"block_choice {self.block_choice!r} "
                    f"{'needs' if field == needed else 'takes no'} {field}"
                )
        if needed and not self.permutations:
            raise ValueError(f"block_choice {self.block_choice!r} needs permutations, such as 999")
        return self
