"""Reports to an engine's front end why the engine's processes failed.

A failing process appends a line to a file that the front end names in an environment variable, which all
processes of the engine inherit; the file does not exist until something fails. The first line is the root
cause: a worker fails before the engine core that waits for it. A killed process is identified by its exit
status. The cause is appended to the message of a failed start. To ``EngineDeadError``, whose message is sent
to clients, it is added as a note, which only tracebacks show.
"""

from __future__ import annotations

import os
import secrets
import signal
import sys
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import chain
from multiprocessing.connection import wait
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from vllm_steer.vllm_compat import patched_symbols as symbols
from vllm_steer.vllm_compat import patches
from vllm_steer.vllm_compat.root_cause import MARK, describe

if TYPE_CHECKING:
    from multiprocessing.process import BaseProcess

    from vllm.v1.engine.core import EngineCoreProc
    from vllm.v1.engine.exceptions import EngineDeadError
    from vllm.v1.engine.utils import CoreEngineProcManager
    from vllm.v1.executor.multiproc_executor import UnreadyWorkerProcHandle, WorkerProc

R = TypeVar("R")

# Not VLLM_..., which vLLM would warn about.
VARIABLE = "_VLLM_STEER_FAILURES"
_WARNINGS = "PYTHONWARNINGS"
# The exit status of a process is available a moment after its end is seen.
_REAPED = 5.0

# Failure file to the processes that may write to it, for each engine that this process started.
_started: dict[str, Callable[[], Iterable[BaseProcess]]] = {}
# Processes of the workers that this process, an engine core, has started.
_workers: list[BaseProcess] = []


def name_file(original: Callable[..., None]) -> Callable[..., None]:
    """Wraps ``CoreEngineProcManager.__init__``, which starts the engine cores."""

    def __init__(self: CoreEngineProcManager, *args: object, **kwargs: object) -> None:
        file = f"vllm-steer-{secrets.token_hex(8)}.failures"
        path = os.environ[VARIABLE] = str(Path(tempfile.gettempdir(), file))
        known = weakref.ref(self)
        _started[path] = lambda: getattr(known(), "processes", ())
        weakref.finalize(self, _forget, path)
        with _quiet_tracker():
            original(self, *args, **kwargs)

    return __init__


def explain_start(original: Callable[..., R]) -> Callable[..., R]:
    """Wraps ``wait_for_engine_startup`` to append the root cause to its error."""

    def wait_for_engine_startup(*args: object, **kwargs: object) -> R:
        try:
            return original(*args, **kwargs)
        except RuntimeError as error:
            if found := cause():
                error.args = (f"{error}. {MARK}{found}", *error.args[1:])
            raise

    return wait_for_engine_startup


def explain_death(original: Callable[..., None]) -> Callable[..., None]:
    """Wraps ``EngineDeadError.__init__`` to add the root cause as a note."""

    def __init__(self: EngineDeadError, *args: object, **kwargs: object) -> None:
        original(self, *args, **kwargs)
        if found := cause():
            self.add_note(f"{MARK}{found}")

    return __init__


def watch_workers(original: Callable[..., R]) -> Callable[..., R]:
    """Wraps ``WorkerProc.wait_for_ready`` to record the workers, since a killed one reports nothing."""

    def wait_for_ready(
        unready_proc_handles: list[UnreadyWorkerProcHandle], *args: object, **kwargs: object
    ) -> R:
        _workers[:] = [handle.proc for handle in unready_proc_handles]
        return original(unready_proc_handles, *args, **kwargs)

    return wait_for_ready


def report_worker(original: Callable[..., None]) -> Callable[..., None]:
    """Wraps ``WorkerProc.__init__``, whose errors otherwise only reach the worker's log."""

    def __init__(self: WorkerProc, *args: object, **kwargs: object) -> None:
        with reported():
            original(self, *args, **kwargs)

    return __init__


def run_engine_core(*args: object, **kwargs: object) -> object:
    """Runs ``EngineCoreProc.run_engine_core`` in its process."""
    with reported():
        return patches.original(symbols.RUN_ENGINE_CORE)(*args, **kwargs)


def report_death(original: Callable[..., None]) -> Callable[..., None]:
    """Wraps ``EngineCoreProc._send_engine_dead``, after which the front end looks for a cause."""

    def _send_engine_dead(self: EngineCoreProc) -> None:
        if (error := sys.exc_info()[1]) is not None:
            _report(error)
        original(self)

    return _send_engine_dead


def worker_main(*args: object, **kwargs: object) -> object:
    """Runs ``WorkerProc.worker_main`` in its process, before vLLM loads the plugin there."""
    patches.patch(symbols.WORKER_PROC_INIT, report_worker)
    return patches.original(symbols.WORKER_MAIN)(*args, **kwargs)


@contextmanager
def reported() -> Iterator[None]:
    """Reports exceptions raised within it."""
    try:
        yield
    except Exception as error:
        _report(error)
        raise


def cause() -> str | None:
    """Why an engine of this process ended, the one started last first; None if none ended."""
    paths = dict.fromkeys((os.environ.get(VARIABLE, ""), *reversed(_started)))
    reports = (line for path in paths for line in _lines(path))
    ended = (_killed(processes()) for processes in reversed(_started.values()))
    return next(filter(None, chain(reports, ended)), None)


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


def _report(error: BaseException) -> None:
    """Reports an error, preceded by the death of a worker that may have caused it.

    Only once, since the front end may have removed the file by the next time.
    """
    path = os.environ.pop(VARIABLE, "")
    lines = filter(None, (_killed(_workers), describe(error)))
    # If reporting fails, the error itself is still raised and logged.
    with suppress(OSError):
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW
        descriptor = os.open(path, flags, 0o600)
        with open(descriptor, "w", encoding="utf-8", errors="replace") as file:
            file.writelines(f"{line}\n" for line in lines)


def _killed(processes: Iterable[BaseProcess]) -> str | None:
    """Describes the first process that was ended by a signal other than vLLM's own."""
    watched = list(processes)
    ended = wait([process.sentinel for process in watched], timeout=0)
    for process in watched:
        if process.sentinel not in ended:
            continue
        process.join(_REAPED)
        status = process.exitcode or 0
        if status < 0 and -status != signal.SIGTERM:
            why = ", as the kernel does when memory runs out" if -status == signal.SIGKILL else ""
            return f"{process.name} was ended by {signal.Signals(-status).name}{why}"
    return None


@contextmanager
def _quiet_tracker() -> Iterator[None]:
    """Python's resource tracker, which starts within it, removes a killed process's shared memory without the
    warning that would be the last line of a failed start."""
    given = os.environ.get(_WARNINGS)
    quiet = "ignore:resource_tracker:UserWarning"
    os.environ[_WARNINGS] = f"{given},{quiet}" if given else quiet
    try:
        yield
    finally:
        if given is None:
            del os.environ[_WARNINGS]
        else:
            os.environ[_WARNINGS] = given


def _forget(path: str) -> None:
    _started.pop(path, None)
    Path(path).unlink(missing_ok=True)
