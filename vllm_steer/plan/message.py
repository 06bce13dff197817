"""The message that carries a request's plan to the engine: typed and versioned, with one decoder.

vLLM passes ``SamplingParams.extra_args`` between its processes unread, so a plan is one value there,
MessagePack bytes. Importing this module imports neither torch nor vllm.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import msgspec

from vllm_steer.errors import RequestError
from vllm_steer.plan.reads import Read, StopRule
from vllm_steer.plan.steering_plan import Segment, SteeringPlan
from vllm_steer.request.schema import PLAN_KEY

if TYPE_CHECKING:
    from vllm.pooling_params import PoolingParams
    from vllm.sampling_params import SamplingParams

VERSION = 4
# Number of decoded plans to cache; the scheduler reads a plan for every block of its prompt.
_DECODED = 1024


class _Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The message.

    Attributes:
        version: :data:`VERSION` of the sending process.
        segments: The plan's segments.
        reads: The plan's reads.
        rules: The plan's rules.
    """

    version: int
    segments: tuple[Segment, ...]
    reads: tuple[Read, ...] = ()
    rules: tuple[StopRule, ...] = ()


_decoder = msgspec.msgpack.Decoder(_Message)


def encode_plan(plan: SteeringPlan) -> bytes:
    """Returns the message of a plan."""
    return msgspec.msgpack.encode(_Message(VERSION, plan.segments, plan.reads, plan.rules))


@lru_cache(maxsize=_DECODED)
def decode_plan(message: bytes) -> SteeringPlan:
    """Inverse of :func:`encode_plan`; equal messages give the same object.

    Raises:
        RequestError: It is malformed, or has another version.
    """
    try:
        found = _decoder.decode(message)
    except msgspec.MsgspecError as error:
        raise RequestError(f"the steering plan is malformed: {error}") from error
    if found.version != VERSION:
        raise RequestError(
            f"the steering plan has version {found.version}, this engine reads {VERSION}; run the same vllm-steer "
            f"in every process"
        )
    return SteeringPlan(found.segments, found.reads, found.rules)


def plan_of(sampling_params: SamplingParams | PoolingParams | None) -> SteeringPlan | None:
    """Returns the plan of an engine's request; None if it is not steered.

    Args:
        sampling_params: Its ``SamplingParams``, None for pooling requests.

    Raises:
        RequestError: The value is not a plan.
    """
    message = (getattr(sampling_params, "extra_args", None) or {}).get(PLAN_KEY)
    if message is None:
        return None
    if not isinstance(message, bytes):
        raise RequestError(f"the steering plan is malformed: {type(message).__name__}, not bytes")
    return decode_plan(message)
