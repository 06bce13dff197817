"""Which language a text is in, by a library or a user's script."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Protocol

from vllm_steer.errors import EvaluationError
from vllm_steer.offline.evaluate.script import Script, said_of

# What the library tells apart and the benchmark does not; Tibetan is close to its Dzongkha, in the same script.
_SAME = {"nb": "no", "nn": "no", "dz": "bo"}


class Identifier(Protocol):
    """Tells languages."""

    @property
    def name(self) -> str:
        """Description written with the figures."""

    def languages(self, texts: Sequence[str]) -> list[str | None]:
        """Returns the code of each text's language, ISO 639-1 where there is one; None where it cannot be told."""


class Langid:
    """The library ``py3langid``: 97 languages, its model part of it."""

    def __init__(self) -> None:
        """Loads the model.

        Raises:
            EvaluationError: It is not installed.
        """
        try:
            import py3langid
        except ModuleNotFoundError as error:
            raise EvaluationError(
                "py3langid is not installed; pip install 'vllm-steer[bench]', or give --language-script"
            ) from error
        self._classify = py3langid.classify
        self.name = f"py3langid {version('py3langid')}"

    def languages(self, texts: Sequence[str]) -> list[str | None]:
        """Returns the code of each text's language; None for a text without letters."""
        return [self._language(text) for text in texts]

    def _language(self, text: str) -> str | None:
        if not any(map(str.isalpha, text)):
            return None
        found = str(self._classify(text)[0])
        return _SAME.get(found, found)


@dataclass(frozen=True)
class ScriptIdentifier:
    """A user's script, which is sent ``answer`` and says a code, such as of fastText's model."""

    script: Script

    @property
    def name(self) -> str:
        """The script's name."""
        return f"script {self.script.name}"

    def languages(self, texts: Sequence[str]) -> list[str | None]:
        """Returns the code of each text's language.

        Raises:
            EvaluationError: The script fails, or says something that is neither a code nor null.
        """
        found: list[str | None] = []
        for line in self.script.ask([{"answer": text} for text in texts]):
            value, error = said_of(line)
            if isinstance(line, dict) and "error" in line:
                raise EvaluationError(f"the script {self.script.file.name}: {error}")
            if value is not None and not isinstance(value, str):
                raise EvaluationError(
                    f"the script {self.script.file.name} gave {str(value)[:40]!r}, no code of a language, such as 'de'"
                )
            found.append(value)
        return found
