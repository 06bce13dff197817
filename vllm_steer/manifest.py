"""The manifest of a steering pack, ``steering_config.json``: what it must say, field by field.

Importing this module imports neither torch nor vllm.
"""

from __future__ import annotations

from collections import Counter
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

SCHEMA_VERSION: Final = 1
VECTORS_FILE: Final = "steering_vectors.safetensors"

PositionChoice = Literal["all", "prompt", "generated", "last_prompt"]
PackName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,127}$")]
# A direction is named in requests as pack/direction, and as direction:scale in the flat form.
DirectionName = Annotated[
    str, Field(pattern=r"^[^\s/:\x00-\x1f](?:[^/:\x00-\x1f]{0,126}[^\s/:\x00-\x1f])?$")
]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
LayerIndex = Annotated[int, Field(ge=0)]
Finite = Annotated[float, Field(allow_inf_nan=False)]


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=())


class ModelIdentity(_Record):
    """The model that a pack's directions were learned from.

    Attributes:
        name: Name or path given at extraction; informative only.
        architecture: Class name in the checkpoint's configuration, such as ``LlamaForCausalLM``.
        model_type: ``model_type`` of the checkpoint's configuration, such as ``llama``.
        hidden_size: Width of the residual stream.
        num_layers: Number of decoder blocks.
        chat_template_sha256: Digest of the tokenizer's chat template, None when it has none.
    """

    name: str
    architecture: str
    model_type: str
    hidden_size: int = Field(gt=0)
    num_layers: int = Field(gt=0)
    chat_template_sha256: Sha256 | None


class MethodRecord(_Record):
    """How a pack's directions were learned: enough to learn them again.

    Attributes:
        name: Method, such as ``attention_guided``.
        settings: Every setting that changes the result.
        libraries: Version of each library that computed them.
        seed: Seed of all randomness.
        data_sha256: Digest of the prompts.
    """

    name: str
    settings: dict[str, Any]
    libraries: dict[str, str]
    seed: int
    data_sha256: Sha256


class DirectionRecord(_Record):
    """One direction of a pack.

    Attributes:
        name: Name of the concept, unique in the pack.
        layers: Layers that the direction has a vector for, ascending; row i of the tensor belongs
            to ``layers[i]``.
        default_scale: Scale (ε) used when a request names none.
        safe_scale: Largest |scale| found to leave the text fluent.
        positions: Token positions steered when a request names none.
        metrics: Figures of the extraction, for people to read.
    """

    name: DirectionName
    layers: list[LayerIndex] = Field(min_length=1)
    default_scale: Finite
    safe_scale: Annotated[Finite, Field(gt=0)]
    positions: PositionChoice
    metrics: dict[str, Any] = {}

    @model_validator(mode="after")
    def _ascending(self) -> DirectionRecord:
        if sorted(set(self.layers)) != self.layers:
            raise ValueError("layers must be ascending and distinct")
        return self


class TensorFile(_Record):
    """Identity of the tensor file; a pack whose file differs is refused."""

    file: Literal["steering_vectors.safetensors"]
    sha256: Sha256
    size: int = Field(gt=0)


class Manifest(_Record):
    """Content of ``steering_config.json``.

    Attributes:
        schema_version: Version of this layout.
        name: Name of the pack, the part before the slash in ``pack/direction``.
        model: The model that the directions belong to.
        layer_convention: Layer k is the output of decoder block k, counted from 0.
        hook_point: The vector is added to the residual stream after the block.
        directions: The directions, in the order of extraction.
        method: How they were learned.
        residual_norms: Mean Euclidean norm of the residual stream after each layer, on unprefixed
            prompts; keys are layers in decimal, as JSON wants strings.
        tensors: Identity of the tensor file.
    """

    schema_version: Literal[1]
    name: PackName
    model: ModelIdentity
    layer_convention: Literal["block_output_0_based"]
    hook_point: Literal["residual_stream_after_block"]
    directions: list[DirectionRecord] = Field(min_length=1, max_length=100_000)
    method: MethodRecord
    residual_norms: dict[
        Annotated[str, Field(pattern=r"^[0-9]{1,5}$")], Annotated[Finite, Field(gt=0)]
    ]
    tensors: TensorFile

    @model_validator(mode="after")
    def _consistent(self) -> Manifest:
        counts = Counter(direction.name for direction in self.directions)
        twice = sorted(name for name, count in counts.items() if count > 1)
        if twice:
            raise ValueError(f"directions must have distinct names; given twice: {twice[:5]}")
        for direction in self.directions:
            if direction.layers[-1] >= self.model.num_layers:
                raise ValueError(
                    f"direction {direction.name!r} has layer {direction.layers[-1]}; the model has layers "
                    f"0 to {self.model.num_layers - 1}"
                )
            unmeasured = [
                layer for layer in direction.layers if str(layer) not in self.residual_norms
            ]
            if unmeasured:
                raise ValueError(
                    f"residual_norms lacks layers {unmeasured} of direction {direction.name!r}"
                )
        return self


def explain_faults(error: ValidationError) -> str:
    """Returns what is wrong with a manifest, each fault with its field; never the whole input."""
    faults = [
        f"{'.'.join(map(str, fault['loc'])) or 'manifest'}: {fault['msg']}"
        for fault in error.errors()[:5]
    ]
    more = error.error_count() - len(faults)
    return "; ".join(faults) + (f"; and {more} more" if more > 0 else "")
