"""Everyday questions for the prefixed model: for learning, stopping, tuning and reporting.

The parts are disjoint, so that no strength is chosen on the questions that vectors were learned from, and
none is reported on the questions it was chosen on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from vllm_steer.errors import ExtractionError
from vllm_steer.offline.files import read_lines

# Ends of the parts, as shares of all questions.
_LEARNED, _STOPPING, _TUNING = 0.6, 0.7, 0.8
# Smaller parts would be unreliable.
LEAST = 40


@dataclass(frozen=True)
class Everyday:
    """Questions by purpose.

    Attributes:
        learned: Vectors are learned from the answers to these.
        stopping: Training stops by the answers to these.
        tuning: Strengths and layers are chosen on these.
        heldout: What is reported is measured on these.
    """

    learned: tuple[str, ...]
    stopping: tuple[str, ...]
    tuning: tuple[str, ...]
    heldout: tuple[str, ...]


def everyday_questions(file: Path | None = None) -> Everyday:
    """Returns the built-in questions, or those of a file.

    Args:
        file: One question per line; None for the built-in ones.

    Raises:
        ExtractionError: The file cannot be read or has too few distinct questions.
    """
    if file is None:
        text = (files("vllm_steer.offline.questions") / "everyday_questions.txt").read_text(
            encoding="utf-8"
        )
        return _split(text.splitlines())
    lines = read_lines(file, ExtractionError)
    if len(set(lines)) < LEAST:
        raise ExtractionError(
            f"--questions: {file} has {len(set(lines))} distinct questions; at least {LEAST} are needed, to "
            f"learn from, to tune and to report on"
        )
    return _split(lines)


def _split(lines: Sequence[str]) -> Everyday:
    questions = tuple(dict.fromkeys(line.strip() for line in lines if line.strip()))
    ends = [round(len(questions) * share) for share in (_LEARNED, _STOPPING, _TUNING)]
    parts = zip([0, *ends], [*ends, len(questions)], strict=True)
    return Everyday(*(questions[start:end] for start, end in parts))
