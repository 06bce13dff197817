"""CLaS-Bench's files: ``LANGUAGE.txt`` for each language, a question a line, the same questions in every file."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from vllm_steer.errors import EvaluationError, choices
from vllm_steer.offline.files import read_lines

_CODE = re.compile(r"[a-z]{2,3}")


def read_questions(
    folder: Path, languages: Sequence[str] | None, count: int | None
) -> dict[str, list[str]]:
    """Returns the questions by language; question k means the same in all of them.

    Args:
        folder: Directory of the files.
        languages: Codes of the languages that are wanted; None for all that there are.
        count: Number of questions, the first ones; None for all.

    Raises:
        EvaluationError: There is no such directory or file, a file cannot be read, or files have different numbers of
            questions, so that they cannot be the same ones.
    """
    if not folder.is_dir():
        raise EvaluationError(
            f"{folder} is no directory; it must have a file LANGUAGE.txt for each language"
        )
    files = {file.stem: file for file in sorted(folder.glob("*.txt")) if _CODE.fullmatch(file.stem)}
    wanted = list(files if languages is None else dict.fromkeys(languages))
    for language in wanted:
        if language not in files:
            raise EvaluationError(
                f"{folder} has no questions in {language!r}; {choices(language, files)}"
            )
    if not wanted:
        raise EvaluationError(f"{folder} has no file LANGUAGE.txt, such as en.txt")
    found = {language: read_lines(files[language], EvaluationError)[:count] for language in wanted}
    lengths = {language: len(lines) for language, lines in found.items()}
    if len(set(lengths.values())) > 1 or min(lengths.values()) < 2:
        raise EvaluationError(
            f"{folder}: files must have the same questions, at least two; they have {lengths}"
        )
    return found
