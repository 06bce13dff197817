"""The terms of a segment -> the components of its row, and the schedule of each component.

A row has a vector and some components, and each token has a factor for the vector and for every component. If
all terms have the same schedule, plain additions are summed in the vector, and each layer assigns components
separately. Terms with different schedules, including additions, have the same components at every layer; what a
feature adds at every token has no schedule and is in the vector.
Importing this module imports neither torch nor vllm.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vllm_steer.plan.steering_plan import Segment
from vllm_steer.request.schedule import Schedule


@dataclass(frozen=True)
class Layout:
    """Where the terms of a segment go.

    Attributes:
        ranks: Components of each term, in the order of the segment's terms; 0 is part of the vector.
        slots: First component of each term at every layer; None if each layer assigns its own.
        schedules: Schedule of the vector, and of each component after it; None is the factor 1.
    """

    ranks: tuple[int, ...]
    slots: tuple[int, ...] | None
    schedules: tuple[Schedule | None, ...]

    @property
    def rank(self) -> int:
        """Total components of all terms."""
        return sum(self.ranks)


def planes_first(ranks: Sequence[int]) -> list[int]:
    """Returns the indices of terms in the order of their components: planes first, so each gets a pair.

    Args:
        ranks: Components of each term.
    """
    return sorted(range(len(ranks)), key=lambda number: -ranks[number])


def layout_of(segment: Segment, rank: int) -> Layout:
    """Returns where the terms of a segment go.

    Args:
        segment: The segment.
        rank: Components of a row; if terms with different schedules need more, the layout has more.
    """
    terms = segment.terms
    if len(segment.schedules) == 1:
        (schedule,) = segment.schedules
        return Layout(tuple(term.rank for term in terms), None, (schedule,) * (1 + rank))
    added = any(term.form.op == "feature" and term.added for term in terms)
    shared = None if added else next((term.schedule for term in terms if not term.rank), None)
    ranks = tuple(term.rank or int(term.schedule != shared) for term in terms)
    slots, schedules = [0] * len(terms), [shared]
    for number in planes_first(ranks):
        slots[number] = len(schedules) - 1
        schedules += [terms[number].schedule] * ranks[number]
    schedules += [None] * (1 + rank - len(schedules))
    return Layout(ranks, tuple(slots), tuple(schedules))
