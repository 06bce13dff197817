"""Steering content -> extra keys of vLLM's block hashes.

Keys and values that were computed under steering are found again only by requests whose steering
gives the same values there. The key of a block holds, for every steered range that meets it, the
content of the sum and the offsets inside the block; hashes are chained, so later blocks inherit
it, and blocks before the first steered position stay shared with unsteered requests.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm_steer.plan_message import plan_of
from vllm_steer.until import stop_position

ExtraKeys = Callable[[Any, int, int], list[tuple[str, Any]]]


def steered_extra_keys(original: ExtraKeys) -> ExtraKeys:
    """Wraps vLLM's ``_gen_prompt_embeds_extra_hash_keys``, the one place that knows a block's range.

    Args:
        original: The function of ``vllm.v1.core.kv_cache_utils``.

    Returns:
        The function to put in its place.
    """

    def extra_keys(request: Any, start: int, end: int) -> list[tuple[str, Any]]:
        keys = original(request, start, end)
        plan = plan_of(request.sampling_params)
        for segment in plan.segments if plan is not None else ():
            first = max(segment.start, start)
            last = end if segment.end is None else min(segment.end, end)
            if segment.until is not None:
                stop = stop_position(segment.until, request.all_token_ids[:end])
                last = last if stop is None else min(last, stop + 1)
            if first < last:
                # vLLM publishes key[1] of each tuple in its cache events, so it stays a string.
                keys = [*keys, ("steering", f"{segment.key}:{first - start}:{last - start}")]
        return keys

    return extra_keys
