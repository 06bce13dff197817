"""Who waits for rows, and for how long: never more than fit, nobody for ever, and no key alone."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Coroutine
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_steer.serving.row_queue import RowQueue, Ticket

ROOM = 16


def run(coroutine: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(coroutine, 20))


def sums(name: str, count: int) -> list[str]:
    return [f"{name} {number}" for number in range(count)]


async def inside(queue: RowQueue, owner: str | None, name: str, count: int) -> Ticket:
    """Enters where there must be room."""
    return await queue.enter(owner, sums(name, count), 0.01)


async def refused(queue: RowQueue, owner: str | None, name: str, count: int) -> None:
    with pytest.raises(TimeoutError):
        await queue.enter(owner, sums(name, count), 0.01)


def test_one_key_in_its_order() -> None:
    async def check() -> None:
        queue, order = RowQueue(4), []

        async def one(number: int) -> None:
            ticket = await queue.enter(None, [str(number)])
            order.append(number)
            await asyncio.sleep(0)
            queue.leave(ticket)

        await asyncio.gather(*map(one, range(20)))
        assert order == list(range(20))

    run(check())


def test_a_short_request_does_not_wait_for_long_ones_nor_they_for_ever() -> None:
    async def check() -> None:
        queue = RowQueue(ROOM)
        first = await inside(queue, None, "long 0", 8)
        await refused(queue, None, "long 1", 4)
        shorts = [await inside(queue, None, f"short {number}", 1) for number in range(8)]
        waiting = asyncio.ensure_future(queue.enter(None, sums("long 2", 8)))
        await asyncio.sleep(0)
        # There is room for it when the other is gone, whatever else comes.
        queue.leave(first)
        assert (await waiting).inside
        queue.leave(shorts.pop())
        another = asyncio.ensure_future(queue.enter(None, sums("long 3", 8)))
        await asyncio.sleep(0)
        queue.leave(waiting.result())
        assert (await another).inside

    run(check())


def test_what_needs_all_rows_is_let_in_before_what_came_later() -> None:
    async def check() -> None:
        queue = RowQueue(ROOM)
        short = await inside(queue, None, "short", 1)
        whole = asyncio.ensure_future(queue.enter(None, sums("whole", ROOM)))
        await asyncio.sleep(0)
        await refused(queue, None, "later", 1)
        queue.leave(short)
        queue.leave(await whole)
        await inside(queue, None, "later", 1)

    run(check())


def test_no_key_holds_all_rows_where_there_are_two() -> None:
    async def check() -> None:
        queue = RowQueue(ROOM)
        queue.leave(await inside(queue, "b", "x", 1))
        for number in range(12):
            await inside(queue, "a", f"a{number}", 1)
        await refused(queue, "a", "a12", 1)
        waiting = [asyncio.ensure_future(queue.enter("a", [f"a{n}"])) for n in range(13, 16)]
        await asyncio.sleep(0)
        # Nor does another wait behind it.
        last = [await inside(queue, "b", f"b{number}", 1) for number in range(4)]
        for ticket in last:
            queue.leave(ticket)
        await asyncio.sleep(0)
        assert not any(one.done() for one in waiting)
        for one in waiting:
            one.cancel()

    run(check())


@pytest.mark.parametrize("held", [1, 8, 12])
@pytest.mark.parametrize("waits", [8, ROOM])
def test_a_key_that_waits_for_its_own_rows_stops_no_other(held: int, waits: int) -> None:
    """One long answer, and one more request that cannot be let in before it ends."""

    async def check() -> None:
        queue = RowQueue(ROOM)
        queue.leave(await inside(queue, "b", "x", 1))
        long = await inside(queue, "a", "long", held)
        waiting = asyncio.ensure_future(queue.enter("a", sums("more", waits)))
        await asyncio.sleep(0)
        if waiting.done():
            queue.leave(waiting.result())
        for number in range(20):
            queue.leave(await inside(queue, "b", f"short {number}", 1))
        queue.leave(long)
        queue.leave(await waiting)

    run(check())


def test_what_needs_all_rows_stops_short_ones_only_while_it_waits_for_them() -> None:
    async def check() -> None:
        queue = RowQueue(ROOM)
        long = await inside(queue, None, "long", 8)
        whole = asyncio.ensure_future(queue.enter(None, sums("whole", ROOM)))
        await asyncio.sleep(0)
        short = await inside(queue, None, "short", 1)
        queue.leave(long)
        await refused(queue, None, "later", 1)
        queue.leave(short)
        queue.leave(await whole)

    run(check())


@pytest.mark.parametrize("wanted", [8, 12, ROOM])
def test_short_requests_of_a_key_leave_room_for_its_long_one(wanted: int) -> None:
    """They come without a pause, beside those of another key, and it is let in nevertheless."""

    async def check() -> None:
        queue, done = RowQueue(ROOM), asyncio.Event()

        async def shorts(owner: str, name: str) -> None:
            while not done.is_set():
                ticket = await queue.enter(owner, [name])
                for _ in range(3):
                    await asyncio.sleep(0)
                queue.leave(ticket)

        others = [asyncio.ensure_future(shorts("a", f"a{n}")) for n in range(9)]
        others += [asyncio.ensure_future(shorts("b", f"b{n}")) for n in range(3)]
        await asyncio.sleep(0)
        queue.leave(await queue.enter("a", sums("long", wanted), 5.0))
        done.set()
        await asyncio.gather(*others)

    run(check())


def test_equal_sums_share_a_row_and_leaving_twice_is_leaving_once() -> None:
    async def check() -> None:
        queue = RowQueue(2)
        tickets = [await queue.enter(None, ["same"], 0.01) for _ in range(5)]
        other = await queue.enter(None, ["other"], 0.01)
        for ticket in tickets[1:]:
            queue.leave(ticket)
            queue.leave(ticket)
        await refused(queue, None, "third", 1)
        queue.leave(other)
        await inside(queue, None, "third", 1)
        await queue.enter(None, [], 0.01)

    run(check())


def test_who_goes_away_leaves_the_line_and_its_rows() -> None:
    async def check() -> None:
        queue = RowQueue(1)
        first = await queue.enter(None, ["a"])
        waiting = asyncio.ensure_future(queue.enter(None, ["b"]))
        behind = asyncio.ensure_future(queue.enter(None, ["c"]))
        await asyncio.sleep(0)
        waiting.cancel()
        # Let in and cancelled in the same moment.
        queue.leave(first)
        behind.cancel()
        await asyncio.gather(waiting, behind, return_exceptions=True)
        queue.leave(await queue.enter(None, ["d"], 0.01))
        assert not queue._active
        assert not queue._by_owner
        assert not any(queue._lines.values())

    run(check())


@settings(deadline=None, max_examples=100)
@given(
    room=st.integers(1, 20),
    seed=st.integers(0, 2**32),
    count=st.integers(1, 40),
    owners=st.integers(1, 3),
)
def test_never_more_than_fit_and_everybody_is_served(
    room: int, seed: int, count: int, owners: int
) -> None:
    rng, served, held = random.Random(seed), [], dict[int, list[str]]()

    async def one(queue: RowQueue, number: int) -> None:
        wanted = rng.sample(sums("s", 2 * room), rng.randint(1, room))
        for _ in range(rng.randrange(4)):
            await asyncio.sleep(0)
        ticket = await queue.enter(rng.choice([None, "a", "b"][:owners]), wanted)
        held[number] = wanted
        assert len(set().union(*held.values())) <= room
        try:
            for _ in range(rng.randrange(6)):
                await asyncio.sleep(0)
        finally:
            del held[number]
            queue.leave(ticket)
        served.append(number)

    async def all_of_them() -> None:
        queue = RowQueue(room)
        tasks = [asyncio.ensure_future(one(queue, number)) for number in range(count)]
        gone = rng.sample(tasks, count // 4)
        await asyncio.sleep(0)
        for task in gone:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        faults = [r for r in results if r and not isinstance(r, asyncio.CancelledError)]
        assert not faults
        assert not queue._active

    run(all_of_them())
    assert len(served) >= count - count // 4
