"""Steering content -> extra keys of vLLM's block hashes.

Keys and values computed under steering are reused only by requests whose steering gives the same values
there. The key of a block holds, for every steered range that overlaps it, the content of the sum and the
offsets inside the block; hashes are chained, so later blocks inherit it, and blocks before the first steered
position stay shared with unsteered requests.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from vllm_steer.plan.message import plan_of
from vllm_steer.request.stop_tokens import StopTokens
from vllm_steer.vllm_compat.attached import Attached

if TYPE_CHECKING:
    from vllm.v1.request import Request

    # Kind of a key, and its hashed value; vLLM's own are bytes, others text.
    ExtraKey = tuple[str, bytes | str]
    ExtraKeys = Callable[[Request, int, int], list[ExtraKey]]


class _Searched(NamedTuple):
    """How far a request's tokens were searched for a trigger, and the position of the first, if any."""

    end: int
    found: int | None


_SEARCHED = Attached[_Searched]("searched")


def steered_extra_keys(original: ExtraKeys) -> ExtraKeys:
    """Wraps vLLM's ``_gen_prompt_embeds_extra_hash_keys``, the only function that knows a block's range.

    Args:
        original: The function of ``vllm.v1.core.kv_cache_utils``.

    Returns:
        The function that replaces it.
    """

    def extra_keys(request: Request, start: int, end: int) -> list[ExtraKey]:
        keys = original(request, start, end)
        plan = plan_of(request.sampling_params)
        for segment in plan.segments if plan is not None else ():
            first = max(segment.start, start)
            last = end if segment.end is None else min(segment.end, end)
            if segment.stop is not None:
                trigger = _first_trigger(request, segment.stop, end)
                last = last if trigger is None else min(last, trigger + 1)
            if first < last:
                # vLLM publishes key[1] of each tuple in its cache events, so it stays a string.
                keys = [*keys, ("steering", f"{segment.key}:{first - start}:{last - start}")]
        return keys

    return extra_keys


def _first_trigger(request: Request, stop: StopTokens, end: int) -> int | None:
    """Position of the first trigger among a request's tokens before ``end``.

    It is called for successive blocks of a request whose tokens only grow at the end, so each token is
    checked once.
    """
    seen, found = _SEARCHED.get(request) or _Searched(stop.origin, None)
    if found is None and seen < end:
        tokens = request.all_token_ids
        found = next((at for at in range(seen, end) if tokens[at] in stop.tokens), None)
        _SEARCHED.set(request, _Searched(end, found))
    return found if found is not None and found < end else None
