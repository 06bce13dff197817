"""One step's token spans -> the ranges of positions to steer, and the row of the bank for each.

Every token's position is absolute, so whether it is prompt or generated depends on nothing that
the scheduler does: chunked, preempted and recomputed tokens get the row that they would get alone.
Pure numpy, no vllm.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from vllm_steer.resolve import Segment, SteeringPlan

ZERO_ROW = 0
NO_END = np.iinfo(np.int32).max


@dataclass(frozen=True)
class TokenSpan:
    """The tokens of one request in a step.

    Attributes:
        request_id: The request.
        start: Absolute position of the first token; under speculative decoding the highest that
            it can be, since the host does not know yet how many drafts were accepted.
        length: Number of tokens.
    """

    request_id: str
    start: int
    length: int


@dataclass(frozen=True, eq=False)
class StepPlan:
    """What a step needs.

    Attributes:
        new: Rows to fill before the step, with the segment whose sum goes there.
        owners: int32 ``[num_tokens]``, the index in the batch of each token's request; None when
            no token of the step is steered.
        ranges: int32 ``[most ranges of a request, num_requests, 3]``: first position, position
            after the last, row. The ranges of a request are disjoint; absent ones are empty.
    """

    new: tuple[tuple[int, Segment], ...]
    owners: np.ndarray | None
    ranges: np.ndarray


class StepPlanner:
    """Assigns rows to combinations and ranges of positions to rows.

    Equal combinations share a row. A row stays with its combination after the last request that
    used it, and is given away least recently used first.
    """

    def __init__(self, num_rows: int, *, starts_are_exact: bool = True) -> None:
        """Makes a planner.

        Args:
            num_rows: Rows of the bank, the zero row among them.
            starts_are_exact: Whether the spans' starts are; false under speculative decoding.
        """
        self._plans: dict[str, SteeringPlan] = {}
        self._rows: OrderedDict[str, int] = OrderedDict()
        self._free = list(range(num_rows - 1, ZERO_ROW, -1))
        self._starts_are_exact = starts_are_exact

    def add(self, request_id: str, plan: SteeringPlan) -> None:
        """Takes a request in; one that is known already gets the new plan."""
        if plan.segments:
            self._plans[request_id] = plan

    def remove(self, request_id: str) -> None:
        """Forgets a request; unknown ones are ignored, since most requests are not steered."""
        self._plans.pop(request_id, None)

    def plan(self, spans: Iterable[TokenSpan]) -> StepPlan:
        """Plans one step.

        Args:
            spans: Spans of the step's requests, in the order of their tokens in the batch.

        Raises:
            RuntimeError: More combinations meet in the step than the bank has rows.
        """
        if not self._plans:
            return _UNSTEERED
        lengths: list[int] = []
        met: list[tuple[int, list[Segment]]] = []
        for index, span in enumerate(spans):
            lengths.append(span.length)
            plan = self._plans.get(span.request_id)
            segments = self._meeting(plan, span) if plan else []
            if segments:
                met.append((index, segments))
        if not met:
            return _UNSTEERED
        assigned, new = self._assign({s.key: s for _, segments in met for s in segments})
        ranges = np.zeros((max(len(s) for _, s in met), len(lengths), 3), dtype=np.int32)
        for index, segments in met:
            for number, segment in enumerate(segments):
                end = NO_END if segment.end is None else segment.end
                ranges[number, index] = segment.start, end, assigned[segment.key]
        return StepPlan(new, np.repeat(np.arange(len(lengths), dtype=np.int32), lengths), ranges)

    def _meeting(self, plan: SteeringPlan, span: TokenSpan) -> list[Segment]:
        """The segments that the span's tokens can lie in."""
        first = span.start if self._starts_are_exact else 0
        return [
            segment
            for segment in plan.segments
            if segment.start < span.start + span.length
            and (segment.end is None or first < segment.end)
        ]

    def _assign(
        self, wanted: dict[str, Segment]
    ) -> tuple[dict[str, int], tuple[tuple[int, Segment], ...]]:
        """Rows of the step's combinations, giving away rows that the step does not use."""
        for key in wanted:
            if key in self._rows:
                self._rows.move_to_end(key)
        new = []
        for key, segment in wanted.items():
            if key in self._rows:
                continue
            if self._free:
                row = self._free.pop()
            else:
                oldest = next(iter(self._rows))
                if oldest in wanted:
                    raise RuntimeError(
                        f"{len(wanted)} distinct steerings meet in one step, the bank has {len(self._rows)} rows; "
                        f"raise --steering-rows"
                    )
                row = self._rows.pop(oldest)
            self._rows[key] = row
            new.append((row, segment))
        return {key: self._rows[key] for key in wanted}, tuple(new)


_UNSTEERED = StepPlan((), None, np.zeros((0, 0, 3), dtype=np.int32))
