"""The types of a manifest's values.

Importing this module imports neither torch nor vllm.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Final, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

MAX_LAYERS: Final = 10_000
# Keeps scale x vector far from the float32 overflow, whatever norms a manifest claims.
MAX_MAGNITUDE: Final = 1e9


def _no_path(name: str) -> str:
    if name in (".", "..") or "\\" in name:
        raise ValueError("must not be . or .. and must not contain a backslash")
    return name


PositionChoice = Literal["all", "prompt", "generated", "last_prompt"]
PackName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,127}$")]
# A direction is named in requests as pack/direction, and as direction:scale in the flat form.
DirectionName = Annotated[
    str,
    Field(
        pattern=r"^[^\s/:\x00-\x1f\x7f-\x9f](?:[^/:\x00-\x1f\x7f-\x9f]{0,126}[^\s/:\x00-\x1f\x7f-\x9f])?$"
    ),
    AfterValidator(_no_path),
]
# Shown on terminals, where control characters are commands.
Line = Annotated[str, Field(pattern=r"^[^\x00-\x1f\x7f-\x9f]{0,1024}$")]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
LayerIndex = Annotated[int, Field(ge=0, lt=MAX_LAYERS)]
Scale = Annotated[float, Field(ge=-MAX_MAGNITUDE, le=MAX_MAGNITUDE)]
Positive = Annotated[float, Field(gt=0, le=MAX_MAGNITUDE)]
# The bound also excludes NaN and infinity.
Finite = Annotated[float, Field(allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
# A threshold of a probe, by the false-positive rate that it was chosen for.
ThresholdName = Annotated[str, Field(pattern=r"^fpr=[0-9]{0,4}\.?[0-9]{1,12}(?:e-[0-9]{1,2})?$")]


def rate_of(threshold: str) -> float:
    """Returns the false-positive rate that a threshold is named by."""
    return float(threshold.removeprefix("fpr="))


class Record(BaseModel):
    """A part of a manifest: no unknown keys, and no conversion of values."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=())


def is_ascending(values: Sequence[float]) -> bool:
    """Whether each value is greater than the one before it."""
    return all(low < high for low, high in zip(values, values[1:], strict=False))


def show_layers(layers: Sequence[int]) -> str:
    """``[1, 2, 3, 7]`` as ``1-3, 7``."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
