"""A vLLM engine in a process of its own, seen from the process that measures.

Several live side by side, stopped by a signal while they wait, since some of their threads poll; so timed
runs can alternate between them. An engine may run in another environment: a rival's plugin is put on its path alone.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

from benchmarks.arms import ExtraArgs

ROOT = Path(__file__).parents[1]
START_TIMEOUT = 900


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


class EngineError(RuntimeError):
    """The engine did not start, died, or refused; the message holds its own words."""


class Engine:
    """A running engine."""

    def __init__(
        self,
        name: str,
        arguments: Mapping[str, Any],
        environment: Mapping[str, str],
        path: Sequence[Path] = (),
    ) -> None:
        """Starts an engine and waits until it is ready.

        Args:
            name: Name in messages.
            arguments: Arguments of ``LLM``.
            environment: Environment variables that differ from this process's.
            path: Folders that only this engine imports from.
        """
        self.name = name
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._connection, child = Pipe()
        paths = [*map(str, path), str(ROOT), os.environ.get("PYTHONPATH", "")]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.engine_child", str(child.fileno())],
            env=os.environ
            | {
                # One process for front end and engine: nothing hides behind another core, and
                # admission is part of what is timed.
                "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
                "VLLM_LOGGING_LEVEL": "WARNING",
                "HF_HUB_OFFLINE": "1",
                "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            }
            | dict(environment),
            stdout=self._log,
            stderr=subprocess.STDOUT,
            pass_fds=[child.fileno()],
        )
        child.close()
        self._connection.send(dict(arguments))
        self._answer(START_TIMEOUT)

    def run(
        self, prompts: Sequence[Sequence[int]], extra: Sequence[ExtraArgs], count: int
    ) -> Timing:
        """Times one batch, each request generating ``count`` tokens."""
        return Timing(*self._ask("run", list(prompts), list(extra), count))

    def generate(
        self, prompts: Sequence[Sequence[int]], extra: Sequence[ExtraArgs], count: int
    ) -> list[tuple[list[int], list[dict[int, float]]]]:
        """Greedy tokens of each prompt and, for each token, the best log-probabilities by token."""
        answer: list[Any] = self._ask("generate", list(prompts), list(extra), count)
        return answer

    def profile(
        self, prompts: Sequence[Sequence[int]], extra: Sequence[ExtraArgs], steps: int
    ) -> dict[str, Any]:
        """Profiles decode steps; :func:`benchmarks.profile_step.profile_decode` says what returns."""
        answer: dict[str, Any] = self._ask("profile", list(prompts), list(extra), steps)
        return answer

    def describe(self) -> dict[str, Any]:
        """What the engine runs with: versions, model runner, graphs, device."""
        answer: dict[str, Any] = self._ask("describe")
        return answer

    def cpu_seconds(self) -> float:
        """Processor time that the process has used, from outside it."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def close(self) -> None:
        """Ends the process."""
        try:
            self._process.send_signal(signal.SIGCONT)
            self._connection.send(("stop",))
            self._process.wait(60)
        except (OSError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()

    def _ask(self, command: str, *arguments: Any) -> Any:
        self._process.send_signal(signal.SIGCONT)
        self._connection.send((command, *arguments))
        return self._answer(START_TIMEOUT)

    def _answer(self, timeout: float) -> Any:
        if not self._connection.poll(timeout):
            raise EngineError(f"{self.name} did not answer in {timeout:g} s\n{self._last_words()}")
        try:
            kind, value = self._connection.recv()
        except (EOFError, ConnectionError):
            raise EngineError(f"{self.name} died\n{self._last_words()}") from None
        if kind == "error":
            raise EngineError(f"{self.name}: {value}\n{self._last_words()}")
        self._process.send_signal(signal.SIGSTOP)
        return value

    def _last_words(self, lines: int = 15) -> str:
        self._log.seek(0)
        return "\n".join(self._log.read().splitlines()[-lines:])
