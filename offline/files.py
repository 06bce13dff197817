"""Files that are there whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def write_atomically(file: Path, content: str | bytes) -> None:
    """Writes a file by renaming a complete one into place; makes its directory if missing."""
    file.parent.mkdir(parents=True, exist_ok=True)
    data = content.encode() if isinstance(content, str) else content
    with tempfile.NamedTemporaryFile(
        dir=file.parent, prefix=f".{file.name}.", delete=False
    ) as stream:
        try:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
            os.chmod(stream.name, 0o644)
            os.replace(stream.name, file)
        except BaseException:
            os.unlink(stream.name)
            raise
