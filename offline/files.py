"""Reading of text files, and atomic writing of files."""

from __future__ import annotations

from pathlib import Path

from vllm_steer.errors import SteeringError
from vllm_steer.packs.pack import replace_file


def read_text(file: Path, error: type[SteeringError]) -> str:
    """Returns the text of a user's file, without a byte order mark.

    Args:
        file: The file.
        error: Error to raise if it cannot be read as UTF-8.
    """
    try:
        return file.read_text(encoding="utf-8-sig")
    except OSError as fault:
        raise error(f"cannot read {file}: {fault.strerror}; give a text file") from fault
    except UnicodeDecodeError as fault:
        raise error(
            f"cannot read {file}: it is not in UTF-8 (byte {fault.start}); save it as UTF-8, such as by "
            f"iconv -f latin1 -t utf-8"
        ) from fault


def read_lines(file: Path, error: type[SteeringError], strip: bool = True) -> list[str]:
    """Returns the nonblank lines of such a file, stripped or with all their white space."""
    lines = read_text(file, error).splitlines(keepends=True)
    return [line.strip() if strip else line for line in lines if line.strip()]


def write_atomically(file: Path, content: str | bytes) -> None:
    """Writes a file by renaming a complete one into place; creates its directory if missing."""
    file.parent.mkdir(parents=True, exist_ok=True)
    replace_file(file, content.encode() if isinstance(content, str) else content)
