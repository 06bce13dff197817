"""Content that the requests of an engine need, from the moment they are taken in until they are done.

A pack may be forgotten while a request that the front end has lost sight of still waits or runs. The engine
core keeps what such a request needs, here and in its workers, so that no worker ever lacks content.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.request import Request

R = TypeVar("R")


class ContentHolds:
    """Digests by request; one thread takes requests in while another ends them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held: dict[str, frozenset[str]] = {}

    def hold(self, request_id: str, digests: Iterable[str]) -> None:
        """Keeps content for a request."""
        with self._lock:
            self._held[request_id] = frozenset(digests)

    def release(self, request_id: str) -> None:
        """Ends that; requests without steering hold nothing."""
        with self._lock:
            self._held.pop(request_id, None)

    def drop_unheld(self, digests: Iterable[str], drop: Callable[[set[str]], None]) -> set[str]:
        """Drops content that no request needs, while none can be taken in.

        Args:
            digests: What nobody else needs.
            drop: Drops it in this process.

        Returns:
            What was dropped.
        """
        with self._lock:
            unheld = set(digests).difference(*self._held.values())
            drop(unheld)
            return unheld


# Ids of requests are unique, also where a process has several engines.
HOLDS = ContentHolds()


def release_held(original: Callable[..., R]) -> Callable[..., R]:
    """Wraps ``Scheduler._free_request``, by which every request leaves that finishes or is aborted."""

    def _free_request(self: Scheduler, request: Request, *args: object, **kwargs: object) -> R:
        HOLDS.release(request.request_id)
        return original(self, request, *args, **kwargs)

    return _free_request
