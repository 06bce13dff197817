"""A fair queue of steered requests for rows of the bank, without starvation.

Running requests never need more rows than there are. The queue admits requests as follows:

- Small requests and large ones, which need more than an eighth of the rows, wait in separate lines. Large
  requests together use at most half of the rows, or a single one as many as it needs, so a small request
  never waits for many large ones. While a large request waits, small ones leave its half free, and the rest
  that it needs once no other large request runs, so it is never starved.
- API keys take turns, and the requests of one key are served in order. As soon as there are two keys, neither
  uses more than three quarters of the rows, except by a single request. A request that waits for its own
  key's rows blocks no other key; small requests of its key leave rows free for it.

Imports neither torch nor vllm.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Collection
from dataclasses import dataclass, field

# Fractions of all rows.
_MANY = 1 / 8
_OF_MANY = 1 / 2
_OF_ONE_KEY = 3 / 4
# Keys seen so far, to know whether there are two.
_KNOWN_OWNERS = 2


@dataclass(eq=False)
class Ticket:
    """A request in the queue, waiting or admitted.

    Attributes:
        owner: SHA-256 of its API key, None without one.
        sums: Keys of its sums.
        many: Whether it is a large request.
        entered: Done when it is admitted.
        inside: Whether it uses its rows.
    """

    owner: str | None
    sums: frozenset[str]
    many: bool
    entered: asyncio.Future[None] = field(repr=False)
    inside: bool = False


class RowQueue:
    """The queue of one engine."""

    def __init__(self, num_sums: int) -> None:
        """Makes a queue.

        Args:
            num_sums: Distinct sums that may be active at once.
        """
        self._room = num_sums
        self._active: Counter[str] = Counter()
        self._by_line: dict[bool, Counter[str]] = {False: Counter(), True: Counter()}
        # Small and large requests separately.
        self._by_owner: dict[tuple[str | None, bool], Counter[str]] = {}
        # In order of turns; a key that is admitted moves to the end.
        self._lines: dict[bool, dict[str | None, deque[Ticket]]] = {False: {}, True: {}}
        self._owners: set[str | None] = set()

    async def enter(
        self, owner: str | None, sums: Collection[str], seconds: float | None = None
    ) -> Ticket:
        """Waits until a request's sums fit.

        Args:
            owner: SHA-256 of its API key, None without one.
            sums: Keys of its sums, at most the capacity of the queue.
            seconds: Time limit; None for no limit.

        Returns:
            The ticket for :meth:`leave`.

        Raises:
            TimeoutError: It did not fit in time.
        """
        many = len(set(sums)) > max(1.0, _MANY * self._room)
        future = asyncio.get_running_loop().create_future()
        ticket = Ticket(owner, frozenset(sums), many, future)
        if len(self._owners) < _KNOWN_OWNERS:
            self._owners.add(owner)
        if not sums:
            return ticket
        self._lines[many].setdefault(owner, deque()).append(ticket)
        self._let_in()
        try:
            async with asyncio.timeout(seconds):
                await future
        except BaseException:
            self._withdraw(ticket)
            raise
        return ticket

    def leave(self, ticket: Ticket) -> None:
        """Releases a request's rows; idempotent."""
        if ticket.inside:
            ticket.inside = False
            for held in self._holders(ticket):
                held.subtract(ticket.sums)
                held += Counter()
            if not self._by_owner[ticket.owner, ticket.many]:
                del self._by_owner[ticket.owner, ticket.many]
            self._let_in()

    def _withdraw(self, ticket: Ticket) -> None:
        """Removes a request that no longer waits, whether or not it was admitted meanwhile."""
        if ticket.inside:
            self.leave(ticket)
            return
        line = self._lines[ticket.many]
        line[ticket.owner].remove(ticket)
        if not line[ticket.owner]:
            del line[ticket.owner]
        # Others may have waited behind it.
        self._let_in()

    def _let_in(self) -> None:
        """Admits all requests that fit, in turn."""
        while any([self._let_one_in(True), self._let_one_in(False)]):
            pass

    def _let_one_in(self, many: bool) -> bool:
        line = self._lines[many]
        for owner in list(line):
            ticket = line[owner][0]
            if self._has_enough(ticket):
                continue
            if not self._fits(ticket):
                # The first one is waited for; otherwise it would be overtaken repeatedly.
                return False
            waiting = line.pop(owner)
            waiting.popleft()
            if waiting:
                # The key's next turn comes after those of all others.
                line[owner] = waiting
            self._take(ticket)
            return True
        return False

    def _take(self, ticket: Ticket) -> None:
        ticket.inside = True
        self._by_owner.setdefault((ticket.owner, ticket.many), Counter())
        for held in self._holders(ticket):
            held.update(ticket.sums)
        # A cancelled request leaves as soon as it runs again.
        if not ticket.entered.done():
            ticket.entered.set_result(None)

    def _holders(self, ticket: Ticket) -> tuple[Counter[str], ...]:
        own = self._by_owner[ticket.owner, ticket.many]
        return self._active, self._by_line[ticket.many], own

    def _has_enough(self, ticket: Ticket) -> bool:
        """Whether its key holds, or waits for, a key's maximum share when there are others."""
        if len(self._owners) < _KNOWN_OWNERS:
            return False
        few, many = (self._by_owner.get((ticket.owner, kind), Counter()) for kind in (False, True))
        waiting, kept = self._lines[True].get(ticket.owner), 0
        if waiting and not ticket.many and not many:
            # It would never be admitted if small requests kept taking the key's share.
            kept = len(waiting[0].sums)
        held = few.keys() | many.keys()
        if not held and not kept:
            return False
        return len(held | ticket.sums) + kept > _OF_ONE_KEY * self._room

    def _fits(self, ticket: Ticket) -> bool:
        if len(self._active.keys() | ticket.sums) > self._room:
            return False
        line = self._by_line[ticket.many]
        after = len(line.keys() | ticket.sums)
        if ticket.many:
            return not line or after <= _OF_MANY * self._room
        return after <= self._room - self._kept_for_many()

    def _kept_for_many(self) -> float:
        """Rows that small requests leave free while a large one waits."""
        heads = (waiting[0] for waiting in self._lines[True].values())
        first = next((ticket for ticket in heads if not self._has_enough(ticket)), None)
        if first is None:
            return 0.0
        half = _OF_MANY * self._room
        # While another large request runs, more free rows would not help.
        return half if self._by_line[True] else max(len(first.sums), half)
