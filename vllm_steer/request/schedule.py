"""Strength over the generated tokens: a factor of the change, by absolute position.

Importing this module imports neither torch nor vllm.
"""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

# Fields of a schedule in the engine's tables.
SCHEDULE_FIELDS = 5
# The factor is 1 everywhere.
CONSTANT = (0.0, 1.0, 1.0, 1.0, 0.0)

_Factor = Annotated[float, Field(allow_inf_nan=False, ge=-1000.0, le=1000.0)]


class ScheduleChoice(BaseModel):
    """A factor of the scale that changes over the generated tokens.

    The prompt's tokens and the first generated one have ``start``. ``linear`` reaches ``end`` after
    ``tokens`` further tokens and stays there; ``exponential`` divides the distance to it by e every
    ``tokens`` tokens.

    Attributes:
        start: Factor at the first generated token.
        end: Final factor.
        tokens: Number of tokens until then.
        shape: ``linear`` or ``exponential``.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    start: _Factor
    end: _Factor
    tokens: Annotated[int, Field(ge=1, le=2**24)]
    shape: Literal["linear", "exponential"] = "linear"


@dataclass(frozen=True)
class Schedule:
    """A schedule of one request.

    Attributes:
        origin: Absolute position of the first generated token.
        start: Factor at that position and before.
        end: Final factor.
        tokens: Number of tokens until then.
        exponential: 1 for that shape, 0 for linear.
    """

    origin: int
    start: float
    end: float
    tokens: int
    exponential: int

    @classmethod
    def of(cls, choice: ScheduleChoice, prompt_len: int) -> Schedule:
        """Returns the schedule of a request whose prompt has ``prompt_len`` tokens."""
        exponential = int(choice.shape == "exponential")
        return cls(prompt_len, choice.start, choice.end, choice.tokens, exponential)

    def to_list(self) -> list[Any]:
        """Returns the fields, in order."""
        return list(astuple(self))

    def to_json(self) -> dict[str, Any]:
        """Returns the fields of :class:`ScheduleChoice` and the origin."""
        shape = "exponential" if self.exponential else "linear"
        return {"origin": self.origin, "start": self.start, "end": self.end} | {
            "tokens": self.tokens,
            "shape": shape,
        }


def factors(positions: Any, table: Any) -> Any:
    """Returns the factor of each token, for numpy arrays and torch tensors.

    Args:
        positions: int ``[num_tokens]``, absolute.
        table: float32 ``[SCHEDULE_FIELDS, ..., num_tokens]``.

    Returns:
        float32 ``[..., num_tokens]``.
    """
    origin, start, end, tokens, exponential = table
    passed = ((positions - origin) / tokens).clip(0.0, None)
    linear = start + (end - start) * passed.clip(None, 1.0)
    return linear + exponential * (end + (start - end) * math.e**-passed - linear)
