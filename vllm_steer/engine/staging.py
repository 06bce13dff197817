"""Reads a pack in the background of a running engine, whose steps continue meanwhile.

The front end asks every process to start reading, asks again until all are done, and then makes them serve
the pack between two steps. A process holds one such pack, the one requested last.
"""

from __future__ import annotations

import threading
from concurrent.futures import Future, wait

from vllm_steer.packs.pack import SteeringPack
from vllm_steer.packs.store import load_checked

_staged: dict[tuple[str, str], Future[SteeringPack]] = {}


def stage(path: str, sha256: str) -> bool:
    """Starts reading a pack, or checks whether it is done.

    Args:
        path: Its directory.
        sha256: Digest of its tensor file.

    Returns:
        Whether it has been read.

    Raises:
        PackError: It is malformed, or is not the requested one.
    """
    future = _staged.get((path, sha256))
    if future is None:
        future = Future()
        drop_staged()
        _staged[path, sha256] = future
        threading.Thread(target=_read, args=(path, sha256, future), daemon=True).start()
    if not future.done():
        return False
    if future.exception() is not None:
        # On the next request, it is read again.
        drop_staged()
    future.result()
    return True


def staged_pack(path: str, sha256: str) -> SteeringPack:
    """Returns a pack, read before or now.

    Raises:
        PackError: As in :func:`stage`.
    """
    stage(path, sha256)
    future = _staged[path, sha256]
    wait([future])
    stage(path, sha256)
    return future.result()


def drop_staged() -> None:
    """Drops the staged pack."""
    _staged.clear()


def _read(path: str, sha256: str, future: Future[SteeringPack]) -> None:
    try:
        pack = load_checked(path, sha256)
        # Cached with the pack; it takes as long as reading.
        _ = pack.digests
    # Any error is for the caller of stage, in another thread.
    except Exception as error:
        future.set_exception(error)
    else:
        future.set_result(pack)
