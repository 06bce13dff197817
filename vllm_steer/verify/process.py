"""A vLLM engine in a process of its own, seen from the process that asks it.

The process gives its memory back when it ends, and what kills it does not kill the one that asks.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

from vllm_steer.errors import EngineError
from vllm_steer.vllm_compat.root_cause import cause_in_log, elsewhere

ExtraArgs = dict[str, Any] | None
# The variable that tells vLLM which plugins to load; without it, all.
PLUGINS = "VLLM_PLUGINS"
# An argument beside those of ``LLM``: the longest context to keep room for, where the model's is longer.
ROOM = "longest_context"
# Of a start or an answer, in seconds: loading a large model from a slow disk takes long.
TIMEOUT = 3600
_STOP_TIMEOUT = 60


@dataclass(frozen=True)
class Timing:
    """One timed run.

    Attributes:
        seconds: Wall time of the whole batch, admission to last token.
        cpu_seconds: Processor time of the engine's process over the same stretch.
        tokens: Tokens processed, prompt and answer.
        generated: Tokens generated.
    """

    seconds: float
    cpu_seconds: float
    tokens: int
    generated: int

    @property
    def speed(self) -> float:
        """Tokens a second, prompt and answer together."""
        return self.tokens / self.seconds


@dataclass(frozen=True)
class Answer:
    """A greedy answer.

    Attributes:
        tokens: Generated token ids.
        logprobs: For each, the best log-probabilities by token id, its own among them.
        cached: Prompt tokens found in the prefix cache.
    """

    tokens: list[int]
    logprobs: list[dict[int, float]]
    cached: int


@dataclass(frozen=True)
class ProcessOptions:
    """How the process of an engine runs.

    Attributes:
        child: Module that it runs.
        path: Folders that only this engine imports from.
        pausing: Whether it is stopped by a signal while it waits, since some of its threads poll and would disturb
            others that are timed.
        timeout: Longest time of a start or an answer, in seconds.
    """

    child: str = "vllm_steer.verify.engine_child"
    path: Sequence[Path] = ()
    pausing: bool = False
    timeout: float = TIMEOUT


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
            arguments: Arguments of ``LLM``, and ``ROOM``.
            environment: Environment variables that differ from this process's.
            options: How the process runs.

        Raises:
            EngineError: The engine does not start.
        """
        self.name = name
        self._pausing, self._timeout = options.pausing, options.timeout
        self._log = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        self._connection, end = Pipe()
        paths = [*map(str, options.path), os.environ.get("PYTHONPATH", "")]
        self._process = subprocess.Popen(
            # -P: a folder of the same name in the working directory is not what is installed.
            [sys.executable, "-P", "-m", options.child, str(end.fileno())],
            env=os.environ
            | {"VLLM_LOGGING_LEVEL": "WARNING", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
            | dict(environment),
            stdout=self._log,
            stderr=subprocess.STDOUT,
            pass_fds=[end.fileno()],
            # A group of its own, so that the processes that vLLM starts end with it.
            start_new_session=True,
        )
        end.close()
        try:
            self._connection.send(dict(arguments))
            self._answer()
        except BaseException:
            self.close()
            raise

    def run(
        self, prompts: Sequence[Sequence[int]], extra: Sequence[ExtraArgs], count: int
    ) -> Timing:
        """Times one batch, each request generating ``count`` tokens.

        Args:
            prompts: Token ids of each prompt.
            extra: ``SamplingParams.extra_args`` of each.
            count: Tokens to generate for each.
        """
        return Timing(*self._ask("run", list(prompts), list(extra), count))

    def answer(
        self, prompts: Sequence[Sequence[int]], extra: Sequence[ExtraArgs], count: int, top: int
    ) -> list[Answer]:
        """Answers all prompts greedily in one batch.

        Args:
            prompts: Token ids of each prompt.
            extra: ``SamplingParams.extra_args`` of each.
            count: Tokens to generate for each.
            top: Log-probabilities to return for each token.
        """
        rows = self._ask("generate", list(prompts), list(extra), count, top)
        return [Answer(*row) for row in rows]

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of a prompt for each text, by the model's chat template where it has one."""
        prompts: list[list[int]] = self._ask("encode", list(texts))
        return prompts

    def forget_prefixes(self) -> None:
        """Empties the prefix cache.

        Raises:
            EngineError: The engine would not.
        """
        if not self._ask("forget_prefixes"):
            raise EngineError(f"{self.name} did not empty its prefix cache")

    def describe(self) -> dict[str, Any]:
        """What the engine runs with: versions, model runner, graphs, device."""
        found: dict[str, Any] = self._ask("describe")
        return found

    def cpu_seconds(self) -> float:
        """Processor time that the process has used, from outside it."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def close(self) -> None:
        """Ends the process and those that it started."""
        with suppress(OSError, EOFError):
            self._process.send_signal(signal.SIGCONT)
            self._connection.send(("stop",))
            # The pipe is closed when the process ends.
            if self._connection.poll(_STOP_TIMEOUT):
                self._connection.recv()
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._connection.close()
        self._log.close()

    def _ask(self, command: str, *arguments: Any) -> Any:
        self._process.send_signal(signal.SIGCONT)
        try:
            self._connection.send((command, *arguments))
        except OSError:
            raise EngineError(f"{self.name} died: {self._death()}") from None
        return self._answer()

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
        """How the process ended, in words."""
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
