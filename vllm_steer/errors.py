"""The exceptions of vllm-steer. Every message says what is wrong and what would be valid.

    SteeringError
    ├── PackError            a steering pack on disk is malformed, damaged or for another model
    ├── RequestError         a request's steering is malformed or names something that does not exist
    │   ├── UnknownDirectionError
    │   ├── DoseError
    │   ├── ConflictError
    │   ├── UnsupportedError
    │   ├── NotAllowedError
    │   └── BusyError
    ├── ConfigError          the engine was asked to start with an unusable steering configuration
    ├── CompatibilityError   this vLLM, model or engine feature cannot be steered correctly
    ├── ExtractionError      a steering vector could not be learned
    ├── EvaluationError      steered answers could not be generated, judged or reported
    ├── EngineError          an engine in a separate process did not start, died or refused
    └── ConversionError      a vector or model file of another tool cannot be read or written

Importing this module imports neither torch nor vllm.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError


class SteeringError(Exception):
    """Base class of every error that vllm-steer raises on purpose."""


class PackError(SteeringError):
    """A steering pack is malformed, damaged, or made for another model."""


class RequestError(SteeringError, ValueError):
    """A request's steering cannot be carried out; becomes HTTP 400.

    Also a ``ValueError``, so that vLLM code that does not know it still answers 400.

    Attributes:
        reason: One word for metrics and logs.
    """

    reason = "malformed"


class UnknownDirectionError(RequestError):
    """No loaded pack has the direction, or several have it."""

    reason = "unknown_direction"


class DoseError(RequestError):
    """The sum of the vectors is longer than allowed."""

    reason = "dose"


class ConflictError(RequestError):
    """The operation is not possible now; becomes HTTP 409."""

    reason = "conflict"


class UnsupportedError(RequestError):
    """The route or generation mode does not support steering."""

    reason = "unsupported"


class NotAllowedError(RequestError):
    """The request's API key may not use the direction."""

    reason = "not_allowed"


class BusyError(RequestError):
    """No row became free in time for the request; becomes HTTP 503."""

    reason = "busy"


class ConfigError(SteeringError, ValueError):
    """The steering configuration of an engine is unusable; the engine does not start."""


class CompatibilityError(SteeringError, RuntimeError):
    """This vLLM version, model or feature cannot be steered correctly; the engine does not start."""


class ExtractionError(SteeringError):
    """A steering vector could not be learned from the data given."""


class EvaluationError(SteeringError):
    """Steered answers could not be generated, judged or reported as asked."""


class EngineError(SteeringError, RuntimeError):
    """An engine in a separate process did not start, died, or refused; the message includes its error."""


class ConversionError(SteeringError):
    """A vector or model file of another tool cannot be read, or a file in its format cannot be written."""


# Input from clients is compared with at most this many names of at most this length, since each takes time.
_LONGEST_COMPARED = 64
_MOST_COMPARED = 256
_LONGEST_MESSAGE = 2048


def choices(wanted: str, available: Iterable[str], limit: int = 8) -> str:
    """Returns the part of a message that lists valid names.

    Args:
        wanted: The name that was not found.
        available: The names that exist.
        limit: Most names to list.
    """
    names = sorted(available)
    if not names:
        return "there is none"
    near = len(wanted) <= _LONGEST_COMPARED and len(names) <= _MOST_COMPARED
    close = difflib.get_close_matches(wanted, names, n=1, cutoff=0.6) if near else []
    hint = f"did you mean {close[0]!r}? " if close else ""
    shown = ", ".join(repr(name) for name in names[:limit])
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return f"{hint}available: {shown}{more}"


def shortened(message: str) -> str:
    """Returns a message without the middle of what may be as long as a client's body."""
    if len(message) <= _LONGEST_MESSAGE:
        return message
    return f"{message[: _LONGEST_MESSAGE // 2]} ... {message[-_LONGEST_MESSAGE // 2 :]}"


def one_line(error: BaseException, limit: int) -> str:
    """Returns an error's message as one line of at most ``limit`` characters, or its type if it is empty."""
    return " ".join(str(error).split())[:limit] or type(error).__name__


def explain_faults(error: ValidationError, whole: str) -> str:
    """Returns the first faults of an input, each with its field; never the input itself.

    Args:
        error: The validation error.
        whole: Name of the input, for faults outside any field.
    """
    faults = [
        f"{'.'.join(map(str, fault['loc'])) or whole}: {fault['msg']}"
        for fault in error.errors()[:5]
    ]
    more = error.error_count() - len(faults)
    return "; ".join(faults) + (f"; and {more} more" if more > 0 else "")
