"""A user's own program as judge: a Python function of a file, or any executable.

It runs in a process of its own, without a shell and with a time limit, so that it can neither change the run that asks
it nor keep it waiting. It is sent a JSON object a line for each answer and writes a line for each, in order.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_steer.errors import EvaluationError
from vllm_steer.offline.evaluate.judges import Case, Grade

FUNCTION = "grade"
_CHILD = "vllm_steer.offline.evaluate.script_child"
_SHOWN = 200


@dataclass(frozen=True)
class Script:
    """A program that says one thing about each of many answers.

    Attributes:
        file: The file.
        function: Function of a Python file; None for an executable.
        timeout: Time limit for all answers together, in seconds.
    """

    file: Path
    function: str | None
    timeout: float = 600.0

    @classmethod
    def parse(cls, given: str, timeout: float = 600.0) -> Script:
        """Returns the script of ``FILE.py``, ``FILE.py:FUNCTION`` or an executable ``FILE``.

        Raises:
            EvaluationError: There is no such file, or it is neither; the message says what it must be.
        """
        name, colon, function = given.rpartition(":")
        if not colon or not name.endswith(".py"):
            name, function = given, FUNCTION
        file = Path(name)
        if not file.is_file():
            raise EvaluationError(f"--script: there is no file {name!r}")
        if file.suffix == ".py":
            if not function.isidentifier():
                raise EvaluationError(f"--script: {function!r} is no name of a function")
            return cls(file.resolve(), function, timeout)
        if not os.access(file, os.X_OK):
            raise EvaluationError(
                f"--script: {name!r} is neither a Python file, *.py, nor executable; chmod +x makes it so"
            )
        return cls(file.resolve(), None, timeout)

    @property
    def name(self) -> str:
        """File, function and a digest of its content, which decides what it says."""
        digest = hashlib.sha256(self.file.read_bytes()).hexdigest()[:12]
        function = f":{self.function}" if self.function else ""
        return f"{self.file.name}{function} {digest}"

    def ask(self, cases: Sequence[dict[str, Any]]) -> list[Any]:
        """Returns what it says of each case: the JSON value of a line.

        Args:
            cases: What it is sent, as JSON objects.

        Raises:
            EvaluationError: It does not start, takes too long, ends with an error, or writes another number of lines or
                something that is no JSON.
        """
        if not cases:
            return []
        sent = "".join(json.dumps(case) + "\n" for case in cases)
        lines = [line for line in self._run(sent).splitlines() if line.strip()]
        if len(lines) != len(cases):
            raise EvaluationError(
                f"the script {self.file.name} wrote {len(lines)} lines for {len(cases)} answers; it must write one for each"
            )
        found = []
        for number, line in enumerate(lines, start=1):
            try:
                found.append(json.loads(line))
            except ValueError as error:
                raise EvaluationError(
                    f"the script {self.file.name} wrote {line[:_SHOWN]!r} in line {number}, which is no JSON"
                ) from error
        return found

    def _run(self, sent: str) -> str:
        command = [str(self.file)]
        if self.function is not None:
            # Without the working directory among its modules.
            command = [sys.executable, "-P", "-m", _CHILD, str(self.file), self.function]
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                encoding="utf-8",
                errors="replace",
                # Its own group, so that what it starts ends with it.
                start_new_session=True,
            )
        except OSError as error:
            raise EvaluationError(
                f"the script {self.file.name} does not start: {error.strerror}"
            ) from error
        with process:
            try:
                written, said = process.communicate(sent, timeout=self.timeout)
            except subprocess.TimeoutExpired as error:
                raise EvaluationError(
                    f"the script {self.file.name} took longer than {self.timeout:g} seconds"
                ) from error
            finally:
                # What it started may outlive it and hold its pipes.
                _end(process)
        if process.returncode:
            reason = said.strip().splitlines()[-1:] or ["it said nothing"]
            raise EvaluationError(
                f"the script {self.file.name} ended with status {process.returncode}: {reason[0][:_SHOWN]}"
            )
        return written


def _end(process: subprocess.Popen[str]) -> None:
    """Ends what is left of a process's group."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


@dataclass(frozen=True)
class ScriptJudge:
    """Grades by a user's script, which is sent ``prompt``, ``answer``, ``finished``, ``concept`` and ``reference``.

    Attributes:
        script: The script. It says a number from 0 to 1, or null where it cannot tell.
    """

    script: Script

    @property
    def name(self) -> str:
        """The script's name."""
        return f"script {self.script.name}"

    def grade(self, cases: Sequence[Case]) -> list[Grade]:
        """Grades all cases; a value that is no grade is a :class:`Grade` without one.

        Raises:
            EvaluationError: As of :meth:`Script.ask`.
        """
        sent = [
            {
                "prompt": case.question.asked,
                "answer": case.answer,
                "finished": case.finished,
                "concept": case.concept,
                "reference": case.reference,
            }
            for case in cases
        ]
        return [_grade(said) for said in self.script.ask(sent)]


def said_of(line: Any) -> tuple[Any, str]:
    """Returns the value of a script's line, and why there is none; a Python function's lines are objects of one field."""
    if isinstance(line, dict) and set(line) == {"error"}:
        return None, str(line["error"])[:_SHOWN]
    value = line["grade"] if isinstance(line, dict) and set(line) == {"grade"} else line
    return value, "" if value is not None else "the script gave none"


def _grade(line: Any) -> Grade:
    value, error = said_of(line)
    if error:
        return Grade(None, error)
    # json.loads reads NaN and Infinity, which no comparison lets through.
    if isinstance(value, int | float) and 0 <= value <= 1:
        return Grade(float(value))
    return Grade(None, f"the script gave {str(value)[:_SHOWN]!r}, no number from 0 to 1")
