"""Settings of learning from the model's own scored answers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from vllm_steer.errors import ExtractionError, explain_faults
from vllm_steer.offline.engine.tokens import Sampling
from vllm_steer.offline.files import read_text
from vllm_steer.offline.models.chat import ChatFormat
from vllm_steer.offline.models.prompts import PrefixRole
from vllm_steer.offline.rollouts.methods import ROLLOUT_METHODS, RolloutMethod, RolloutMethodName


class RolloutSettings(BaseModel):
    """Settings; what a method sets, it sets where nothing else is asked for.

    Attributes:
        method: The method; see ``vllm_steer.offline.rollouts.methods``.
        samples: Answers to each question, for ``persona`` after each instruction.
        temperature: What logits are divided by.
        top_p: Share of the probability that is sampled from.
        answer_length: Longest answer, in tokens.
        threshold: Score from which an answer is right, or shows the trait.
        layers: Blocks; None for all but block 0.
        prefix_role: ``persona``: message with the instruction.
        features: ``corrsteer``: the best feature of all blocks, or the best of ``each``.
        chat_template: Template of the prompts, in Jinja, or ``plain`` for none; None for the tokenizer's own.
        chat_template_kwargs: Arguments of the template, such as ``enable_thinking``.
        batch_size: Answers in a forward pass.
        dtype: Dtype that the model runs in; ``auto`` for bfloat16 where the device computes in it, else float32.
        seed: Seed of the sampling.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: RolloutMethodName
    samples: int = Field(gt=0, le=1024)
    temperature: float = Field(gt=0, le=2)
    top_p: float = Field(default=1.0, gt=0, le=1)
    answer_length: int = Field(default=48, gt=0)
    threshold: float = Field(default=0.5, gt=0, le=1)
    layers: tuple[Annotated[int, Field(ge=0)], ...] | None = Field(default=None, min_length=1)
    prefix_role: PrefixRole = "system"
    features: Literal["best", "each"] = "best"
    chat_template: str | None = Field(default=None, min_length=1)
    chat_template_kwargs: dict[str, JsonValue] = {}
    batch_size: int = Field(default=16, gt=0)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    seed: int = Field(default=0, ge=0, lt=2**31)

    @property
    def chat(self) -> ChatFormat:
        """How prompts are rendered."""
        return ChatFormat(
            chat_template=self.chat_template, chat_template_kwargs=self.chat_template_kwargs
        )

    @property
    def of(self) -> RolloutMethod:
        """The method."""
        return ROLLOUT_METHODS[self.method]

    @property
    def sampling(self) -> Sampling:
        """How answers are sampled."""
        return Sampling(self.temperature, self.top_p)

    @model_validator(mode="before")
    @classmethod
    def _of_method(cls, given: Any) -> Any:
        method = ROLLOUT_METHODS.get(str(given.get("method"))) if isinstance(given, dict) else None
        if method is None:
            return given
        for field, owner in {"features": "corrsteer", "prefix_role": "persona"}.items():
            if field in given and given["method"] != owner:
                raise ValueError(f"{field} belongs to method {owner!r}")
        return {**method.defaults, **given}


def read_settings(file: Path | None, given: Mapping[str, Any]) -> RolloutSettings:
    """Returns the settings of a JSON file, those given besides in their place.

    Raises:
        ExtractionError: The file cannot be read, or a setting is unknown or has no such value; the message names it.
    """
    try:
        read: dict[str, Any] = {}
        if file is not None:
            text = read_text(file, ExtractionError)
            read = TypeAdapter(dict[str, Any]).validate_json(text)
        return RolloutSettings.model_validate({**read, **given})
    except ValidationError as error:
        raise ExtractionError(
            f"settings cannot be used: {explain_faults(error, 'settings')}"
        ) from error
