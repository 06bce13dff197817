"""Steering content -> extra keys of vLLM's block hashes.

Keys and values computed under steering are reused only by requests whose steering gives the same values
there. The key of a block holds, for every steered range that overlaps it, the content of the sum and the
offsets inside the block; hashes are chained, so later blocks inherit it, and blocks before the first steered
position stay shared with unsteered requests. Where token ids decide, it holds what they decided: blocks without such
tokens stay shared, too, and requests that name other tokens share those that were changed alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from vllm_steer.plan.message import plan_of
from vllm_steer.plan.steering_plan import SteeringPlan
from vllm_steer.request.stop_tokens import StopTokens
from vllm_steer.request.token_matches import TokenMatch
from vllm_steer.vllm_compat.attached import Attached

if TYPE_CHECKING:
    from vllm.v1.request import Request

    # Kind of a key, and its hashed value; vLLM's own are bytes, others text.
    ExtraKey = tuple[str, bytes | str]
    ExtraKeys = Callable[[Request, int, int], list[ExtraKey]]


class _Searched(NamedTuple):
    """How far a request's tokens were searched, and the position of the first that was looked for, if any."""

    end: int
    found: int | None


_SEARCHED = Attached[dict["StopTokens | TokenMatch", _Searched]]("searched")


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
        if plan is None:
            return keys
        states = _states(request, plan, start, end) if plan.matches else None
        for segment, mask, state in plan.entries:
            first = max(segment.start, start)
            last = end if segment.end is None else min(segment.end, end)
            if segment.stop is not None:
                trigger = _first(request, segment.stop, end)
                last = last if trigger is None else min(last, trigger + 1)
            if first >= last:
                continue
            runs = [(first, last)]
            if mask and states is not None:
                runs = _runs(states, mask, state, first - start, last - start, start)
            # vLLM publishes key[1] of each tuple in its cache events, so it stays a string.
            for begin, stop in runs:
                keys = [*keys, ("steering", f"{segment.key}:{begin - start}:{stop - start}")]
        return keys

    return extra_keys


def _states(request: Request, plan: SteeringPlan, start: int, end: int) -> list[int]:
    """Which matches of a plan hold at each token of a block, as bits."""
    tokens, states = request.all_token_ids, [0] * (end - start)
    for number, match in enumerate(plan.matches):
        if match.onward:
            first = _first(request, match, end)
            held: Iterable[int] = range(end if first is None else max(first, start), end)
        else:
            held = [at for at in range(start, end) if tokens[at] in match.ids]
        for at in held:
            states[at - start] |= 1 << number
    return states


def _runs(
    states: Sequence[int], mask: int, state: int, first: int, last: int, start: int
) -> list[tuple[int, int]]:
    """The absolute ranges of tokens of a block where matches have a state."""
    runs: list[tuple[int, int]] = []
    for at in range(first, last):
        if states[at] & mask != state:
            continue
        if runs and runs[-1][1] == start + at:
            runs[-1] = runs[-1][0], start + at + 1
        else:
            runs.append((start + at, start + at + 1))
    return runs


def _first(request: Request, wanted: StopTokens | TokenMatch, end: int) -> int | None:
    """Position of the first of some tokens among a request's tokens before ``end``.

    It is called for successive blocks of a request whose tokens only grow at the end, so each token is
    checked once.
    """
    searched = _SEARCHED.get_or_make(request, dict)
    seen, found = searched.get(wanted) or _Searched(wanted.origin, None)
    if found is None and seen < end:
        tokens = request.all_token_ids
        found = next((at for at in range(seen, end) if tokens[at] in wanted.ids), None)
        searched[wanted] = _Searched(end, found)
    return found if found is not None and found < end else None
