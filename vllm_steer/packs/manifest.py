"""The manifest of a steering pack, ``steering_config.json``: its fields and their checks.

Importing this module imports neither torch nor vllm.
"""

from __future__ import annotations

from collections import Counter
from typing import Annotated, Any, Final, Literal

from pydantic import (
    Field,
    JsonValue,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from vllm_steer.errors import explain_faults
from vllm_steer.fields import (
    MAX_LAYERS,
    DirectionName,
    LayerIndex,
    Line,
    PackName,
    Positive,
    Record,
    Scale,
    Sha256,
    is_ascending,
    rate_of,
)
from vllm_steer.operations import FormChoice, Op
from vllm_steer.packs.calibration import Calibration
from vllm_steer.packs.probe import Probe
from vllm_steer.packs.strict_json import parse_json
from vllm_steer.request.positions import Positions

SCHEMA_VERSION: Final = 1
MANIFEST_FILE: Final = "steering_config.json"
VECTORS_FILE: Final = "steering_vectors.safetensors"

# Limits of a pack, which bound a server's memory and time: 10,000 directions at 32 layers fit, and 3,000 with
# all that extraction writes about them.
MAX_MANIFEST_BYTES: Final = 32 * 2**20
MAX_MANIFEST_VALUES: Final = 1_000_000
MAX_VECTORS_BYTES: Final = 8 * 2**30
MAX_DIRECTIONS: Final = 20_000
MAX_HIDDEN_SIZE: Final = 2**20
# Omitted from a manifest if None: older versions refuse unknown keys.
_OPTIONAL: Final = ("default_layers", "safe_scale", "prefix", "calibration", "probe")


class ModelIdentity(Record):
    """The model that a pack's directions were learned from.

    Attributes:
        name: Name or path given at extraction; informative only.
        architecture: Class name in the checkpoint's configuration, such as ``LlamaForCausalLM``.
        model_type: ``model_type`` of the language model's configuration, such as ``llama``; for a
            vision-language model, that of its language model.
        hidden_size: Width of the residual stream.
        num_layers: Number of decoder blocks.
        chat_template_sha256: Digest of the chat template of the prompts, None without one.
    """

    name: Line
    architecture: Line
    model_type: Line
    hidden_size: int = Field(gt=0, le=MAX_HIDDEN_SIZE)
    num_layers: int = Field(gt=0, le=MAX_LAYERS)
    chat_template_sha256: Sha256 | None


class MethodRecord(Record):
    """How a pack's directions were learned, in enough detail to reproduce them.

    Attributes:
        name: Method, such as ``attention_guided``.
        settings: Every setting that changes the result.
        libraries: Version of each library used.
        seed: Seed of all randomness.
        data_sha256: Digest of the prompts.
    """

    name: Line
    settings: dict[str, JsonValue]
    libraries: dict[str, Line]
    seed: int = Field(ge=-(2**63), lt=2**64)
    data_sha256: Sha256


class Prefix(Record):
    """The prefix that makes the model take on a direction's concept without steering.

    Attributes:
        text: The text.
        role: Its place: before the user's text, or in a separate system message.
    """

    text: str = Field(min_length=1, max_length=65536)
    role: Literal["user", "system"] = "user"


class DirectionRecord(Record):
    """One direction of a pack.

    Attributes:
        name: Name of the concept, unique in the pack.
        layers: Layers that the direction has a vector for, ascending; row i of the tensor belongs
            to ``layers[i]``.
        default_layers: Layers steered when a request names none, a subset of ``layers``; None steers them
            all.
        default_scale: Scale (ε) used when a request names none.
        safe_scale: Largest |scale| on ``default_layers`` at which the text was fluent; None if not measured.
        positions: Token positions steered when a request names none, in the form of a request's.
        form: Its default form; None is addition. Directions that the form names are in this pack.
        metrics: Figures of the extraction, informative only.
        prefix: The prefix that makes the model take on the concept without steering; None if unknown.
        calibration: Its calibration on the model; None if it was not calibrated.
        probe: What was measured of its scores; None if nothing was.
    """

    name: DirectionName
    layers: list[LayerIndex] = Field(min_length=1)
    default_layers: list[LayerIndex] | None = Field(default=None, min_length=1)
    default_scale: Scale
    safe_scale: Positive | None = None
    positions: Positions
    form: FormChoice | None = None
    metrics: dict[str, JsonValue] = {}
    prefix: Prefix | None = None
    calibration: Calibration | None = None
    probe: Probe | None = None

    @property
    def steered_layers(self) -> list[int]:
        """Layers steered when a request names none."""
        return self.layers if self.default_layers is None else self.default_layers

    @property
    def op(self) -> Op:
        """Its default op."""
        return (self.form and self.form.op) or "add"

    @model_validator(mode="after")
    def _ascending(self) -> DirectionRecord:
        if not is_ascending(self.layers):
            raise ValueError("layers must be ascending and distinct")
        if not is_ascending(self.steered_layers):
            raise ValueError("default_layers must be ascending and distinct")
        unknown = sorted(set(self.steered_layers) - set(self.layers))
        if unknown:
            raise ValueError(f"default_layers must be a subset of layers; {unknown} are not in it")
        measured = {each.layer for each in self.probe.layers} if self.probe else set()
        if unknown := sorted(measured - set(self.layers)):
            raise ValueError(f"probe.layers must be some of layers; {unknown} are not")
        return self

    @model_serializer(mode="wrap")
    def _written(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields: dict[str, Any] = write(self)
        return {
            key: value for key, value in fields.items() if value is not None or key not in _OPTIONAL
        }


class TensorFile(Record):
    """Identity of the tensor file; a pack whose file differs is refused."""

    file: Literal["steering_vectors.safetensors"]
    sha256: Sha256
    size: int = Field(gt=0, le=MAX_VECTORS_BYTES)


class Manifest(Record):
    """Content of ``steering_config.json``.

    Attributes:
        schema_version: Version of this layout.
        name: Name of the pack, the part before the slash in ``pack/direction``.
        model: The model that the directions belong to.
        layer_convention: Layer k is the output of decoder block k, counted from 0.
        hook_point: The vector is added to the residual stream after the block.
        directions: The directions, in the order of extraction.
        method: How they were learned.
        residual_norms: Median Euclidean norm of the residual stream after each layer over the tokens of
            unprefixed prompts, without the first of each, an attention sink with a far larger norm. Keys are
            decimal layers, since JSON keys are strings.
        tensors: Identity of the tensor file.
    """

    schema_version: Literal[1]
    name: PackName
    model: ModelIdentity
    layer_convention: Literal["block_output_0_based"]
    hook_point: Literal["residual_stream_after_block"]
    directions: list[DirectionRecord] = Field(min_length=1, max_length=MAX_DIRECTIONS)
    method: MethodRecord
    residual_norms: dict[Annotated[str, Field(pattern=r"^[0-9]{1,5}$")], Positive]
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
            self._check_form(direction)
            unmeasured = [
                layer for layer in direction.layers if str(layer) not in self.residual_norms
            ]
            if unmeasured:
                raise ValueError(
                    f"residual_norms lacks layers {unmeasured} of direction {direction.name!r}"
                )
        return self

    def _check_form(self, direction: DirectionRecord) -> None:
        """Raises ValueError if a form names a direction or a threshold that is not in the pack, or is no whole feature."""
        if direction.form is None:
            return
        if direction.op == "feature" and (direction.form.read is None or direction.form.gate):
            raise ValueError(
                f"the form of direction {direction.name!r} has op 'feature', which needs read, and takes no gate"
            )
        layers = {other.name: set(other.layers) for other in self.directions}
        for name in direction.form.partners().values():
            if not set(direction.layers) <= layers.get(name, set()):
                raise ValueError(
                    f"the form of direction {direction.name!r} names {name!r}, which must be a direction of this pack "
                    f"with the same layers"
                )
        gate = direction.form.gate
        if gate is None or gate.at is None:
            return
        probe = next(other.probe for other in self.directions if other.name == gate.direction)
        if rate_of(gate.at) not in (probe.rates if probe else ()):
            raise ValueError(
                f"the form of direction {direction.name!r} names threshold {gate.at!r}, which direction {gate.direction!r} "
                f"has no probe for"
            )


def parse_manifest(data: bytes) -> Manifest:
    """Parses the bytes of a manifest file.

    Args:
        data: The bytes, at most ``MAX_MANIFEST_BYTES``.

    Raises:
        ValueError: It is malformed; the message names each field and its fault.
    """
    try:
        return Manifest.model_validate(parse_json(data, MAX_MANIFEST_VALUES))
    except ValidationError as error:
        raise ValueError(explain_faults(error, "manifest")) from error
