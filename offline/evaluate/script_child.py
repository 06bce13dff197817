"""The process that a user's Python function grades answers in: ``python -m … FILE FUNCTION``.

Reads one JSON object a line and writes one JSON object a line, ``{"grade": …}`` or ``{"error": …}``. What the function
prints goes to stderr, so that it cannot be taken for a grade.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any


def loaded(file: Path, function: str) -> Callable[[dict[str, Any]], Any]:
    """Returns a function of a file.

    Raises:
        SystemExit: The file is no module, or has no such function; the message says which.
    """
    spec = importlib.util.spec_from_file_location("graded_by", file)
    if spec is None or spec.loader is None:
        raise SystemExit(f"{file} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    # Its own imports find what lies beside it, as they do where it runs as a program.
    sys.path.insert(0, str(file.parent))
    spec.loader.exec_module(module)
    found = getattr(module, function, None)
    if not callable(found):
        raise SystemExit(f"{file} has no function {function!r}")
    return found


def main() -> None:
    """Grades what comes on stdin."""
    answers = sys.stdout
    with redirect_stdout(sys.stderr):
        grade = loaded(Path(sys.argv[1]), sys.argv[2])
        for line in sys.stdin:
            answers.write(json.dumps(_graded(grade, json.loads(line))) + "\n")
            answers.flush()


def _graded(grade: Callable[[dict[str, Any]], Any], case: dict[str, Any]) -> dict[str, Any]:
    try:
        value = grade(case)
        # Numbers of NumPy and torch have float(); a bool is a grade as well.
        return {"grade": value if value is None or isinstance(value, str) else float(value)}
    # A user's function may raise anything; it costs that answer its grade and no other.
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


if __name__ == "__main__":
    main()
