"""The root cause of an engine's failure, in one line, from an exception or another process's log.

vLLM starts its engine in separate processes. Failures are logged there; the front end knows that something
failed, not what. Importing this module imports neither torch nor vllm.
"""

from __future__ import annotations

import re

from pydantic import ValidationError

from vllm_steer.errors import explain_faults

# Prefix of the cause in vLLM's errors, see vllm_steer/vllm_compat/failures.py.
MARK = "Root cause: "
# Errors that only say that another process failed.
_ELSEWHERE = (
    "Engine core initialization failed",
    "WorkerProc initialization failed",
    "EngineCore encountered an issue",
)
_FROM_WORKER = re.compile(r"\w+: Worker failed with error '(.+)', please check the stack trace .*")
# The last line of a Python traceback, and argparse's errors.
_NAMED = re.compile(r"[\w.]*(?:Error|Exception): .+|^[\w -]+: error: .+")
_LONGEST = 2000


def cause_of(error: BaseException) -> str:
    """Returns the root cause of an error, or the error itself if it names none."""
    notes = getattr(error, "__notes__", ())
    return next(
        (found for text in (*notes, str(error)) if (found := _marked(text))), describe(error)
    )


def describe(error: BaseException) -> str:
    """Returns type and text of an error, without the engine's text around a worker's error."""
    text = explain_faults(error, "engine") if isinstance(error, ValidationError) else str(error)
    line = f"{type(error).__name__}: {_one_line(text)}" if text else type(error).__name__
    return _FROM_WORKER.sub(r"\1", line)


def cause_in_log(log: str) -> str:
    """Returns the last error in a log that does not merely report another one, else the last line."""
    lines = [line for text in log.splitlines() if (line := text.strip())]
    for at, line in reversed(list(enumerate(lines))):
        if marked := _marked(line):
            return marked
        named = _NAMED.search(line)
        if named and not elsewhere(named[0]):
            # pydantic's details are on the following lines.
            more = lines[at + 1 : at + 2] if "validation error" in named[0] else []
            return _FROM_WORKER.sub(r"\1", " ".join([named[0], *more]))
    return lines[-1] if lines else "nothing"


def elsewhere(text: str) -> bool:
    """Whether an error only says that another process failed."""
    return any(words in text for words in _ELSEWHERE)


def _marked(text: str) -> str | None:
    return _one_line(text.rpartition(MARK)[2]) if MARK in text else None


def _one_line(text: str) -> str:
    """The text without line breaks; the middle of a very long one is left out."""
    line = " ".join(text.split())
    if len(line) <= _LONGEST:
        return line
    half = _LONGEST // 2
    return f"{line[:half]} ... {line[-half:]}"
