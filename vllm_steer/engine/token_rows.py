"""One step's requests and positions -> the row of the bank for each token.

Every token's position is absolute, so whether it is prompt or generated does not depend on the scheduler:
chunked, preempted and recomputed tokens get the same row as alone. A request's ranges are entered into a
table when it arrives; a step takes a few array operations, regardless of the number of layers and directions.
Pure numpy, no vllm.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vllm_steer.engine.row_allocator import RowAllocator
from vllm_steer.plan.row_layout import layout_of
from vllm_steer.plan.steering_plan import Segment, SteeringPlan
from vllm_steer.request.schedule import CONSTANT, factors

NO_END = np.iinfo(np.int32).max
# The slot of every unsteered request: its ranges are empty.
_NO_SLOT = 0
_START, _END, _ROW, _MASK, _STATE = range(5)
RANGE_FIELDS = 5


@dataclass(frozen=True, eq=False)
class TokenRows:
    """The rows of a step's tokens.

    Attributes:
        new: Rows to fill before the step, with the segment of their sum.
        rows: int32 ``[num_tokens]``, the row of each token; None if no request of the step is steered, or if
            only the device knows the positions or the tokens that decide.
        owners: int32 ``[num_tokens]``, the index in the batch of each token's request; None unless the rows
            are found on the device.
        ranges: int32 ``[RANGE_FIELDS, most ranges of a request, num_requests]``: first positions, positions
            after the last, rows, masks and states of matches. Of a request's ranges, at most one holds at any
            token; absent ones are empty. None where ``owners`` is.
        factors: float32 ``[1 + rank, num_tokens]``, the factors of each token's vector and
            components; None is 1 everywhere, or, if ``owners`` is given, as in ``schedules``.
        schedules: float32 ``[SCHEDULE_FIELDS, 1 + rank, ranges, num_requests]``, the schedules of
            each range; None where every factor is 1 or the host knows it.
    """

    new: tuple[tuple[int, Segment], ...] = ()
    rows: np.ndarray | None = None
    owners: np.ndarray | None = None
    ranges: np.ndarray | None = None
    factors: np.ndarray | None = None
    schedules: np.ndarray | None = None


_UNSTEERED = TokenRows()


class TokenRowMapper:
    """Holds the ranges of each steered request and plans the steps of one worker."""

    def __init__(self, num_rows: int, rank: int = 0, *, starts_are_exact: bool = True) -> None:
        """Makes a planner.

        Args:
            num_rows: Rows of the bank, including the zero row.
            rank: Components of a row.
            starts_are_exact: Whether the host knows the positions of a step's tokens. It does not under
                speculative decoding, where it counts drafts that may be rejected.
        """
        self._rank = rank
        self._starts_are_exact = starts_are_exact
        self._allocator = RowAllocator(num_rows)
        self._segments: dict[str, dict[str, Segment]] = {}
        self._plans: dict[str, SteeringPlan] = {}
        self._slots: dict[str, int] = {}
        self._free_slots: list[int] = []
        # [start | end | row | mask | state, range, slot]
        self._table = np.zeros((RANGE_FIELDS, 1, 1), dtype=np.int32)
        # [field of the schedule, vector or component, range, slot]
        self._schedules = _constant(1 + rank, 1, 1)
        # Slots of requests with a schedule.
        self._scheduled: set[int] = set()
        # Slots of requests whose rows the tokens decide.
        self._matched: set[int] = set()
        # Steered requests without rows, or that lost one.
        self._rowless: set[str] = set()
        # The last step's batch and its columns of the table, until a request comes or goes.
        self._batch: list[str] = []
        self._columns: np.ndarray | None = None
        self._schedule_columns: np.ndarray | None = None
        # Whether tokens decide any row of the last step.
        self._decided_by_tokens = False

    def add(self, request_id: str, plan: SteeringPlan) -> None:
        """Adds a request; a known one gets the new plan."""
        self.remove(request_id)
        if not plan.segments:
            return
        if not self._free_slots:
            self._grow(slots=self._table.shape[2])
        slot = self._free_slots.pop()
        if len(plan.entries) > self._table.shape[1]:
            self._grow(ranges=len(plan.entries) - self._table.shape[1])
        for number, (segment, mask, state) in enumerate(plan.entries):
            end = NO_END if segment.end is None else segment.end
            self._table[:, number, slot] = segment.start, end, 0, mask, state
            if segment.schedules != (None,):
                chosen = layout_of(segment, self._rank).schedules
                fields = [schedule.to_list() if schedule else CONSTANT for schedule in chosen]
                self._schedules[:, :, number, slot] = np.array(fields, dtype=np.float32).T
                self._scheduled.add(slot)
        self._slots[request_id] = slot
        self._plans[request_id] = plan
        if plan.matches:
            self._matched.add(slot)
        self._segments[request_id] = plan.sums
        self._allocator.acquire(self._segments[request_id])
        self._rowless.add(request_id)
        self._batch = []

    def remove(self, request_id: str) -> None:
        """Removes a request; unknown ones are ignored, since most requests are not steered."""
        slot = self._slots.pop(request_id, None)
        if slot is None:
            return
        del self._plans[request_id]
        self._allocator.release(self._segments.pop(request_id))
        self._rowless.discard(request_id)
        self._table[:, :, slot] = 0
        if slot in self._scheduled:
            self._schedules[..., [slot]] = _constant(1 + self._rank, self._table.shape[1], 1)
            self._scheduled.remove(slot)
        self._matched.discard(slot)
        self._free_slots.append(slot)
        self._batch = []

    def plan(
        self, request_ids: Sequence[str], starts: np.ndarray, lengths: np.ndarray
    ) -> TokenRows:
        """Plans one step.

        Args:
            request_ids: The step's requests, in the order of their tokens in the batch.
            starts: int ``[num_requests or more]``, absolute position of each one's first token.
            lengths: int ``[num_requests or more]``, each one's number of tokens.

        Raises:
            RuntimeError: The step has more combinations than the bank has rows.
        """
        if not self._slots:
            return _UNSTEERED
        # vLLM changes its list in place, so a copy is compared.
        if request_ids != self._batch:
            self._batch, self._columns = list(request_ids), None
        new = self._assign_rows() if self._rowless else ()
        if self._columns is None:
            self._columns = self._gather()
        if not self._columns.size:
            return _UNSTEERED
        count = len(self._batch)
        lengths = lengths[:count]
        total = int(lengths.sum())
        owners = np.repeat(np.arange(count, dtype=np.int32), lengths) if total != count else None
        if not self._starts_are_exact or self._decided_by_tokens:
            owners = np.arange(count, dtype=np.int32) if owners is None else owners
            schedules = self._schedule_columns
            return TokenRows(new, owners=owners, ranges=self._columns, schedules=schedules)
        positions, columns = starts[:count], self._columns[:_MASK]
        schedules = self._schedule_columns
        if owners is not None:
            before = np.cumsum(lengths) - lengths
            positions = (positions - before)[owners] + np.arange(total)
            columns = columns[:, :, owners]
            schedules = None if schedules is None else schedules[..., owners]
        inside = (columns[_START] <= positions) & (positions < columns[_END])
        rows = (columns[_ROW] * inside).sum(0, dtype=np.int32)
        if schedules is None:
            return TokenRows(new, rows=rows)
        # Ranges are disjoint, so the sum has one summand; tokens outside have the zero row.
        scale = (factors(positions, schedules) * inside).sum(1, dtype=np.float32)
        return TokenRows(new, rows=rows, factors=scale)

    def _gather(self) -> np.ndarray:
        """Columns of the batch's requests, ``[3, ranges, num_requests]``; empty if none is steered."""
        slot = self._slots.get
        slots = np.array([slot(request_id, _NO_SLOT) for request_id in self._batch], dtype=np.intp)
        if not slots.any():
            return np.zeros((3, 0, len(slots)), dtype=np.int32)
        columns: np.ndarray = self._table[:, :, slots]
        self._decided_by_tokens = not self._matched.isdisjoint(slots.tolist())
        # Ranges that no request of the batch has.
        used = columns[_END].any(axis=1)
        scheduled = self._scheduled and not self._scheduled.isdisjoint(slots.tolist())
        self._schedule_columns = self._schedules[..., slots][:, :, used] if scheduled else None
        return np.ascontiguousarray(columns[:, used])

    def _assign_rows(self) -> tuple[tuple[int, Segment], ...]:
        """Assigns rows to the batch's requests without rows."""
        waiting = [request_id for request_id in self._batch if request_id in self._rowless]
        if not waiting:
            return ()
        wanted = {key: s for request_id in waiting for key, s in self._segments[request_id].items()}
        new, lost = self._allocator.assign(wanted, self._needed)
        self._rowless -= set(waiting)
        if lost:
            self._rowless |= {r for r, keys in self._segments.items() if lost & keys.keys()}
        for request_id in waiting:
            slot = self._slots[request_id]
            for number, entry in enumerate(self._plans[request_id].entries):
                self._table[_ROW, number, slot] = self._allocator.row(entry.segment.row_key)
        self._columns = None
        return tuple((row, wanted[key]) for row, key in new)

    def _needed(self) -> set[str]:
        """Keys of all sums that the batch's requests may use."""
        return {key for request_id in self._batch for key in self._segments.get(request_id, ())}

    def _grow(self, ranges: int = 0, slots: int = 0) -> None:
        width = self._table.shape[2]
        self._table = np.pad(self._table, ((0, 0), (0, ranges), (0, slots)))
        more = _constant(1 + self._rank, *self._table.shape[1:])
        more[:, :, : self._schedules.shape[2], : self._schedules.shape[3]] = self._schedules
        self._schedules = more
        self._free_slots += range(width, width + slots)


def _constant(factors: int, ranges: int, slots: int) -> np.ndarray:
    """Schedules whose factor is 1, ``[SCHEDULE_FIELDS, factors, ranges, slots]``."""
    fields = np.array(CONSTANT, dtype=np.float32)
    return np.tile(fields[:, None, None, None], (1, factors, ranges, slots))
