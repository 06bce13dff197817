"""Combinations of directions -> rows of the bank. Equal combinations share a row. Pure Python.

A row keeps its combination after the last request that used it, so that the sum can be reused; the row idle
longest is reassigned first. Preempted requests may lose theirs, and get one again when they run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable

ZERO_ROW = 0


class RowAllocator:
    """Assigns rows to keys, the content identities of sums."""

    def __init__(self, num_rows: int) -> None:
        """Makes an allocator.

        Args:
            num_rows: Rows of the bank; row 0 is zeros and is never assigned.
        """
        self._rows: dict[str, int] = {}
        self._users: Counter[str] = Counter()
        # Keys with a row and without a user, longest idle first.
        self._idle: dict[str, None] = {}
        self._free = list(range(num_rows - 1, ZERO_ROW, -1))

    def acquire(self, keys: Iterable[str]) -> None:
        """Adds a user of the rows of ``keys``."""
        for key in keys:
            self._users[key] += 1
            self._idle.pop(key, None)

    def release(self, keys: Iterable[str]) -> None:
        """Removes a user added by :meth:`acquire`."""
        for key in keys:
            self._users[key] -= 1
            if not self._users[key]:
                del self._users[key]
                if key in self._rows:
                    self._idle[key] = None

    def assign(
        self, keys: Iterable[str], needed: Callable[[], set[str]]
    ) -> tuple[list[tuple[int, str]], set[str]]:
        """Assigns a row to every key.

        Args:
            keys: The keys; each is in use.
            needed: Returns all keys that the step needs, which keep their rows.

        Returns:
            Rows that must be filled with their key, and the keys in use that lost their row.

        Raises:
            RuntimeError: The step needs more combinations than there are rows.
        """
        new, lost = [], set()
        for key in keys:
            if key in self._rows:
                continue
            if self._free:
                row = self._free.pop()
            else:
                victim = next(iter(self._idle), None)
                if victim is None:
                    victim = next((used for used in self._rows if used not in needed()), None)
                    if victim is None:
                        raise RuntimeError(
                            f"{len(needed())} distinct steerings occur in one step, the bank has {len(self._rows)} "
                            f"rows; raise --steering-rows"
                        )
                    lost.add(victim)
                self._idle.pop(victim, None)
                row = self._rows.pop(victim)
            self._rows[key] = row
            new.append((row, key))
        return new, lost

    def row(self, key: str) -> int:
        """The row assigned to a key."""
        return self._rows[key]
