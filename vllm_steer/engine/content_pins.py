"""Pins: content that the requests of an engine need, from admission until they are done.

A pack may be unloaded while a request that the front end no longer tracks still waits or runs. The engine
core keeps the content of such a request, here and in its workers, so that no worker ever lacks it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.request import Request

R = TypeVar("R")


class ContentPins:
    """Digests by request; one thread adds requests while another removes them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pinned: dict[str, frozenset[str]] = {}

    def pin(self, request_id: str, digests: Iterable[str]) -> None:
        """Pins content for a request."""
        with self._lock:
            self._pinned[request_id] = frozenset(digests)

    def unpin(self, request_id: str) -> None:
        """Removes the pins of a request; one without steering has none."""
        with self._lock:
            self._pinned.pop(request_id, None)

    def drop_unpinned(self, digests: Iterable[str], drop: Callable[[set[str]], None]) -> set[str]:
        """Drops content that no request needs, while no request can be added.

        Args:
            digests: Content that nothing else needs.
            drop: Drops it in this process.

        Returns:
            The dropped digests.
        """
        with self._lock:
            unpinned = set(digests).difference(*self._pinned.values())
            drop(unpinned)
            return unpinned


# Request ids are unique even if a process has several engines.
PINS = ContentPins()


def unpin_freed(original: Callable[..., R]) -> Callable[..., R]:
    """Wraps ``Scheduler._free_request``, which every finished or aborted request goes through."""

    def _free_request(self: Scheduler, request: Request, *args: object, **kwargs: object) -> R:
        PINS.unpin(request.request_id)
        return original(self, request, *args, **kwargs)

    return _free_request
