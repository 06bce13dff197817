"""One step's token spans -> the row of the bank that each token reads. Pure numpy, no vllm.

Every token's position is absolute, so whether it is prompt or generated depends on nothing that
the scheduler does: chunked, preempted and recomputed tokens get the row that they would get alone.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from vllm_steer.resolve import Segment, SteeringPlan

ZERO_ROW = 0


@dataclass(frozen=True)
class TokenSpan:
    """The tokens of one request in a step.

    Attributes:
        request_id: The request.
        start: Absolute position of the first token.
        length: Number of tokens.
    """

    request_id: str
    start: int
    length: int


@dataclass(frozen=True)
class StepPlan:
    """What a step needs.

    Attributes:
        rows: int32 ``[num_tokens]``, or None when no token of the step is steered.
        new: Rows to fill before the step, with the segment whose sum goes there.
    """

    rows: np.ndarray | None
    new: tuple[tuple[int, Segment], ...]


class StepPlanner:
    """Assigns rows to combinations and tokens to rows.

    Equal combinations share a row. A row stays with its combination after the last request that
    used it, and is given away least recently used first.
    """

    def __init__(self, num_rows: int) -> None:
        """Makes a planner.

        Args:
            num_rows: Rows of the bank, the zero row among them.
        """
        self._plans: dict[str, SteeringPlan] = {}
        self._rows: OrderedDict[str, int] = OrderedDict()
        self._free = list(range(num_rows - 1, ZERO_ROW, -1))

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
            return StepPlan(None, ())
        offset = 0
        pieces: list[tuple[int, int, Segment]] = []
        for span in spans:
            plan = self._plans.get(span.request_id)
            for segment in plan.segments if plan else ():
                low = max(segment.start, span.start)
                high = span.start + span.length
                if segment.end is not None:
                    high = min(high, segment.end)
                if low < high:
                    pieces.append((offset + low - span.start, offset + high - span.start, segment))
            offset += span.length
        if not pieces:
            return StepPlan(None, ())
        assigned, new = self._assign({segment.key: segment for _, _, segment in pieces})
        rows = np.full(offset, ZERO_ROW, dtype=np.int32)
        for low, high, segment in pieces:
            rows[low:high] = assigned[segment.key]
        return StepPlan(rows, new)

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
