"""A vLLM engine in a separate process, from the side of the caller.

The process frees its memory when it ends, and its crash does not kill the caller.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, Protocol, TypeVar

from vllm_steer.errors import EngineError
from vllm_steer.vllm_compat.root_cause import cause_in_log, elsewhere

if TYPE_CHECKING:
    from vllm import LLM

P = ParamSpec("P")
R = TypeVar("R")
# The variable with the plugins that vLLM loads; without it, all.
PLUGINS = "VLLM_PLUGINS"
# Limit of a start or an answer, in seconds: loading a large model from a slow disk takes long.
TIMEOUT = 3600
_STOP_TIMEOUT = 60


class Process(Protocol):
    """What is used of ``subprocess.Popen``."""

    @property
    def pid(self) -> int: ...

    @property
    def returncode(self) -> int | None: ...

    def wait(self, timeout: float | None = None) -> int: ...

    def send_signal(self, sig: int) -> None: ...


def fresh(end: Connection[Any, Any], log: Path, environment: Mapping[str, str]) -> Process:
    """Starts a new Python that serves an engine.

    Args:
        end: The engine's end of the connection.
        log: File for what it prints.
        environment: Environment variables that differ from this process's.
    """
    with log.open("a") as stream:
        return subprocess.Popen(
            # -P: do not import a folder of the same name in the working directory.
            [sys.executable, "-P", "-m", "vllm_steer.verify.engine_child", str(end.fileno())],
            env=os.environ | dict(environment),
            stdout=stream,
            stderr=subprocess.STDOUT,
            pass_fds=[end.fileno()],
            # A new process group, so that the processes that vLLM starts end with it.
            start_new_session=True,
        )


@dataclass(frozen=True)
class ProcessOptions:
    """Options of an engine's process.

    Attributes:
        path: Import folders for only this engine.
        pausing: Whether it is suspended by a signal while it waits, since some of its threads poll and would
            disturb timed runs.
        timeout: Time limit of a start or an answer, in seconds.
        prepare: What the process calls with the arguments of ``LLM`` before it starts, and may change; a function of
            a module, or ``functools.partial`` of one.
        launch: Starts the process, in a group of its own, as :func:`fresh` does.
    """

    path: Sequence[Path] = ()
    pausing: bool = False
    timeout: float = TIMEOUT
    prepare: Callable[[dict[str, Any]], None] | None = None
    launch: Callable[[Connection[Any, Any], Path, Mapping[str, str]], Process] = fresh


_DEFAULT = ProcessOptions()


class EngineProcess:
    """A running engine."""

    def __init__(
        self,
        name: str,
        arguments: Mapping[str, Any],
        environment: Mapping[str, str],
        options: ProcessOptions = _DEFAULT,
    ) -> None:
        """Starts an engine and waits until it is ready.

        Args:
            name: Name in messages.
            arguments: Arguments of ``LLM``.
            environment: Environment variables that differ from this process's.
            options: How the process runs.

        Raises:
            EngineError: The engine does not start.
        """
        self.name = name
        self._pausing, self._timeout = options.pausing, options.timeout
        self._log = tempfile.NamedTemporaryFile("r", errors="replace")  # noqa: SIM115
        self._connection, end = Pipe()
        paths = [*map(str, options.path), os.environ.get("PYTHONPATH", "")]
        own = {
            "VLLM_LOGGING_LEVEL": "WARNING",
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        }
        self._process = options.launch(end, Path(self._log.name), own | dict(environment))
        end.close()
        try:
            self._connection.send((options.prepare, dict(arguments)))
            self._answer()
        except BaseException:
            self.close()
            raise

    def call(
        self, function: Callable[Concatenate[LLM, P], R], *arguments: P.args, **named: P.kwargs
    ) -> R:
        """What a function returns that the process calls with its ``LLM``.

        Args:
            function: A function of a module.
            arguments: Its arguments behind the ``LLM``.
            named: Its arguments by name.

        Raises:
            EngineError: The function raised, or the engine died or did not answer in time.
        """
        self._process.send_signal(signal.SIGCONT)
        try:
            self._connection.send((function, arguments, named))
        except OSError:
            raise EngineError(f"{self.name} died: {self._death()}") from None
        answer: R = self._answer()
        return answer

    def cpu_seconds(self) -> float:
        """Processor time used by the process, measured from outside."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def close(self) -> None:
        """Ends the process and its children."""
        with suppress(OSError, EOFError):
            self._process.send_signal(signal.SIGCONT)
            self._connection.send(None)
            # The pipe is closed when the process ends.
            if self._connection.poll(_STOP_TIMEOUT):
                self._connection.recv()
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._connection.close()
        self._log.close()

    def _answer(self) -> Any:
        if not self._connection.poll(self._timeout):
            raise EngineError(f"{self.name} did not answer in {self._timeout:g} s")
        try:
            kind, value = self._connection.recv()
        except (EOFError, ConnectionError):
            raise EngineError(f"{self.name} died: {self._death()}") from None
        if kind == "error":
            found = self._logged() if elsewhere(value) else value
            raise EngineError(f"{self.name}: {found}")
        if self._pausing:
            self._process.send_signal(signal.SIGSTOP)
        return value

    def _death(self) -> str:
        """Describes how the process ended."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_STOP_TIMEOUT)
        status = self._process.returncode
        if status is not None and status < 0:
            return f"ended by {signal.Signals(-status).name}; its log ends with: {self._logged()}"
        return f"exit status {status}; its log ends with: {self._logged()}"

    def _logged(self) -> str:
        """The last error in the log, or its last line."""
        self._log.seek(0)
        return cause_in_log(self._log.read())
