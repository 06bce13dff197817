"""What a training can be told; the manifest records all of it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, model_validator

from vllm_steer.offline.models.chat import ChatFormat
from vllm_steer.offline.train.presets.registry import PRESETS
from vllm_steer.offline.train.schedule import Schedule

_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class TrainSettings(BaseModel):
    """Settings of a training; what is not given is the preset's.

    Attributes:
        preset: Objective and form, see ``vllm_steer.offline.train.presets``.
        layers: Blocks that are trained; None for the preset's.
        positions: Where what is trained acts: ``all``, ``prompt``, ``generated``, ``last_prompt``, or the prompt's ends,
            such as ``f2+l2`` for its first two and its last two tokens.
        epochs: How often each example is learned from, at most.
        examples: Examples in a step.
        rate: Step of a parameter.
        schedule: How the step changes: ``constant``, ``linear`` or ``cosine`` down to 0.
        warmup: Share of the steps in which it rises.
        decay: Weight decay.
        clip: Length that gradients are shortened to; None leaves them.
        held_out: Share of the examples that is not learned from, and says what is kept; 0 keeps the last step.
        every: Steps between two looks at them, and between two states that are kept.
        patience: Looks without improvement after which training stops; None for never.
        penalty: ``likelihood``: weight of the vectors' squared lengths beside the loss.
        beta: ``bipo``: β.
        strongest: ``reft_r1``: k, tokens whose detections count.
        sparsity: ``reft_r1``: λ, weight of the other detections.
        rank: ``loreft``: rows of R.
        factor_rate: ``prosv``: step of the factor.
        start: ``prosv``: length that the vector begins with, over the residual stream's.
        end: Whether an answer ends with the tokenizer's token for the end, which is learned as well.
        chat_template: Template of the prompts, in Jinja, or ``plain`` for none; None for the tokenizer's own.
        chat_template_kwargs: Arguments of the template, such as ``enable_thinking``.
        checkpointing: Whether activations are computed again in the backward pass, for memory.
        batch_size: Most examples in a forward pass.
        dtype: Dtype that the model runs in; ``auto`` for bfloat16 where the device computes in it, else float32.
            What is trained is float32.
        seed: Seed of all randomness.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    preset: Literal["likelihood", "bipo", "reft_r1", "loreft", "prosv", "cdas", "jola"]
    layers: tuple[Annotated[int, Field(ge=0)], ...] | None = Field(default=None, min_length=1)
    positions: str = "all"
    epochs: int = Field(gt=0)
    examples: int = Field(gt=0)
    rate: _Positive
    schedule: Schedule = "constant"
    warmup: float = Field(default=0.0, ge=0, lt=1)
    decay: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    clip: _Positive | None = None
    held_out: float = Field(default=0.1, ge=0, le=0.5)
    every: int = Field(default=4, gt=0)
    patience: Annotated[int, Field(gt=0)] | None = None
    penalty: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    beta: _Positive = 0.1
    strongest: int = Field(default=8, gt=0)
    sparsity: float = Field(default=0.005, ge=0, allow_inf_nan=False)
    rank: int = Field(default=4, gt=0, le=64)
    factor_rate: _Positive = 0.052
    start: _Positive = 1.0
    end: bool = True
    chat_template: str | None = Field(default=None, min_length=1)
    chat_template_kwargs: dict[str, JsonValue] = {}
    checkpointing: bool = False
    batch_size: int = Field(default=16, gt=0)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    seed: int = Field(default=0, ge=0)

    @property
    def chat(self) -> ChatFormat:
        """How prompts are rendered."""
        return ChatFormat(
            chat_template=self.chat_template, chat_template_kwargs=self.chat_template_kwargs
        )

    @model_validator(mode="before")
    @classmethod
    def _of_preset(cls, given: Any) -> Any:
        preset = PRESETS.get(str(given.get("preset"))) if isinstance(given, dict) else None
        if preset is None:
            return given
        others = {field for each in PRESETS.values() for field in each.takes} - preset.takes
        for field in sorted(others & given.keys()):
            owners = [name for name, each in PRESETS.items() if field in each.takes]
            raise ValueError(f"{field} belongs to preset {' and '.join(map(repr, owners))}")
        return {**preset.defaults, **given}
