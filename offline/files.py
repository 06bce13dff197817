"""Files that are there whole or not at all."""

from __future__ import annotations

from pathlib import Path

from vllm_steer.pack import replace_file


def write_atomically(file: Path, content: str | bytes) -> None:
    """Writes a file by renaming a complete one into place; makes its directory if missing."""
    file.parent.mkdir(parents=True, exist_ok=True)
    replace_file(file, content.encode() if isinstance(content, str) else content)
