"""Steering content -> extra keys of vLLM's block hashes.

Keys and values that were computed under steering are found again only by requests whose steering
gives the same values there. The key of a block holds, for every steered range that meets it, the
content of the sum and the offsets inside the block; hashes are chained, so later blocks inherit
it, and blocks before the first steered position stay shared with unsteered requests.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm_steer.request import PLAN_KEY
from vllm_steer.until import Until, stop_position

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
        params = request.sampling_params
        payload = (params.extra_args or {}).get(PLAN_KEY) if params is not None else None
        for low, high, key, _, until in payload or ():
            first, last = max(low, start), end if high is None else min(high, end)
            if until is not None:
                stop = stop_position(Until(until[0], tuple(until[1])), request.all_token_ids[:end])
                last = last if stop is None else min(last, stop + 1)
            if first < last:
                # vLLM publishes key[1] of each tuple in its cache events, so it stays a string.
                keys = [*keys, ("steering", f"{key}:{first - start}:{last - start}")]
        return keys

    return extra_keys
