"""Answers of an engine, stored in files by request, so that an interrupted run continues."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vllm_steer.errors import EvaluationError
from vllm_steer.offline.files import write_atomically


class Store:
    """Lists of JSON values, each in a file named by the digest of its requests."""

    def __init__(self, directory: Path | None, common: Mapping[str, Any]) -> None:
        """Names the directory; nothing is written yet.

        Args:
            directory: Directory of the files; None stores nothing.
            common: Everything besides its request that an answer depends on.
        """
        self._directory, self._common = directory, dict(common)

    def load(self, kind: str, requests: Sequence[Any]) -> list[Any] | None:
        """Returns the answers to exactly these requests, or None if they are not stored.

        Raises:
            EvaluationError: Their file is damaged.
        """
        file = self._file(kind, requests)
        if file is None or not file.exists():
            return None
        try:
            found = json.loads(file.read_text())
        except (OSError, ValueError) as error:
            raise EvaluationError(f"{file} is damaged ({error}); delete it") from error
        if not isinstance(found, list) or len(found) != len(requests):
            raise EvaluationError(f"{file} does not have {len(requests)} answers; delete it")
        return found

    def keep(self, kind: str, requests: Sequence[Any], answers: Sequence[Any]) -> None:
        """Writes the answers to these requests."""
        file = self._file(kind, requests)
        if file is not None:
            write_atomically(file, json.dumps(list(answers)))

    def _file(self, kind: str, requests: Sequence[Any]) -> Path | None:
        if self._directory is None:
            return None
        content = {**self._common, "kind": kind, "requests": list(requests)}
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        return self._directory / f"{digest[:32]}.json"


def model_state(model: str | os.PathLike[str]) -> list[Any]:
    """Returns a state that changes when another checkpoint is written to the same directory."""
    files = sorted(Path(model).iterdir()) if Path(model).is_dir() else []
    return [str(model), *([f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in files)]
