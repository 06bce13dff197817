"""How a direction acts on the residual stream: addition, or one of the affine forms.

All forms but one are cases of h ← h + s·v + U·(V·h + b) of low rank, optionally gated by a probe, and
optionally restoring ‖h‖; the other one scales each dimension. A form names further directions of the loaded
packs, so a pack holds only vectors.
Importing this module imports neither torch nor vllm.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)
from pydantic_core import PydanticCustomError

from vllm_steer.fields import ThresholdName

Op = Literal["add", "ablate", "clamp", "rotate", "angle", "affine", "multiply", "feature"]
# What ε does to the activation of a feature.
Activation = Literal["set", "multiply"]
# The effect of each form on the residual stream h; â is the unit vector of the direction, ε the scale.
OPS: Final[dict[str, str]] = {
    "add": "`h + ε·a`",
    "ablate": "`h − ε·â(â·h)`: 1 removes the direction, 2 reflects it",
    "clamp": "`h + â(ε − â·h)`: sets the component to ε",
    "rotate": "rotates h by ε degrees from `a` towards `plane`, in their plane; keeps ‖h‖",
    "angle": "rotates h in that plane to ε degrees from `a`; keeps ‖h‖ (Angular Steering)",
    "affine": "`h + ε·a(r·h + bias)` with `read` as r: closed-loop feedback",
    "multiply": "`h ⊙ (1 + ε·a)`: scales each dimension; needs `--steering-multiply` too",
    "feature": "`h + a(f' − f)`: f is the activation of a sparse autoencoder's feature, `r·h + bias` where that is above "
    "`threshold`, else 0; sets it to f' = ε, or with `activation` `multiply` to f' = ε·f",
}
PLANE_OPS: Final = ("rotate", "angle")
# They read a second direction.
READING_OPS: Final = ("affine", "feature")
# The change is proportional to the scale.
LINEAR_OPS: Final = ("add", "ablate", "affine", "multiply")
# Degrees.
MAX_ANGLE: Final = 360.0

_Name = Annotated[str, Field(min_length=1, max_length=300)]
_Number = Annotated[float, Field(allow_inf_nan=False, ge=-1e9, le=1e9)]
# Smaller ones are constant, and larger ones hard, for any stream.
_Slope = Annotated[float, Field(allow_inf_nan=False, ge=1e-9, le=1e9)]
_PARTNERS: Final = {
    "plane": PLANE_OPS,
    "read": READING_OPS,
    "bias": READING_OPS,
    "threshold": ("feature",),
    "activation": ("feature",),
}


def check_one_threshold(above: float | None, at: str | None) -> None:
    """Raises PydanticCustomError where a threshold is given twice or not at all."""
    if (above is None) == (at is None):
        raise PydanticCustomError(
            "threshold", "give either above, a number, or at, a threshold such as 'fpr=0.01'"
        )


class Gate(BaseModel):
    """A probe: the direction acts only on tokens where it fires, or the more the further it fires.

    Attributes:
        direction: Direction w whose vector is the probe.
        above: θ: it fires where w·h is greater; h is the residual stream before the change.
        at: Instead of ``above``, a measured threshold such as ``fpr=0.01``: that of this false-positive rate of the
            probe of w, at the single steered layer; if no layers are given, at the layer of that probe.
        slope: κ of a soft gate: the change is multiplied by σ(κ(w·h − θ)). None is a hard gate: all of the change
            above θ, and nothing at θ and below.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    direction: _Name
    above: _Number | None = None
    at: ThresholdName | None = None
    slope: _Slope | None = None

    @model_validator(mode="after")
    def _has_one_threshold(self) -> Gate:
        check_one_threshold(self.above, self.at)
        return self

    @model_serializer(mode="wrap")
    def _written(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # Older versions refuse unknown keys of a manifest.
        fields: dict[str, Any] = write(self)
        return {key: value for key, value in fields.items() if value is not None or key != "slope"}


class FormChoice(BaseModel):
    """How a direction acts; a pack gives the default, a request may give another.

    Attributes:
        op: The form; None takes the direction's default, or addition.
        plane: ``rotate`` and ``angle``: direction that spans the plane with this one.
        read: ``affine`` and ``feature``: direction that is read; this one is written.
        bias: ``affine`` and ``feature``: b, added to what is read.
        threshold: ``feature``: θ of JumpReLU, above which the feature is active; None is 0, which is ReLU.
        activation: ``feature``: whether the scale is what the activation is set to, or a factor of it; None sets it.
        gate: Acts only on tokens where a probe fires, or the more the further it fires.
        restore_norm: Whether the norm of the residual stream is restored after the change.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    op: Op | None = None
    plane: _Name | None = None
    read: _Name | None = None
    bias: _Number | None = None
    threshold: Annotated[float, Field(allow_inf_nan=False, ge=0.0, le=1e9)] | None = None
    activation: Activation | None = None
    gate: Gate | None = None
    restore_norm: bool | None = None

    @model_validator(mode="after")
    def _belongs_to_op(self) -> FormChoice:
        for field, ops in _PARTNERS.items():
            if getattr(self, field) is not None and self.op not in ops:
                raise PydanticCustomError(
                    "form",
                    "{field} belongs to op {ops}; op is {op}",
                    {"field": field, "ops": " and ".join(map(repr, ops)), "op": repr(self.op)},
                )
        return self

    def partners(self) -> dict[str, str]:
        """Names of the other directions, by field."""
        gate = self.gate.direction if self.gate else None
        named = {"plane": self.plane, "read": self.read, "gate.direction": gate}
        return {field: name for field, name in named.items() if name is not None}

    def over(self, default: FormChoice | None) -> FormChoice:
        """Returns this choice completed by the direction's default, if this has the same op or none."""
        if default is None or self.op not in (None, default.op or "add"):
            return self
        own: dict[str, Any] = {field: getattr(default, field) for field in FormChoice.model_fields}
        given = {field: value for field in own if (value := getattr(self, field)) is not None}
        return FormChoice(**(own | given))
