"""The tensor file of a pack: safetensors, untrusted, read once and without copies.

The manifest already states the tensors and their shapes, so a header that disagrees is refused before any
tensor is read. The file is read into private memory rather than mapped: overwriting a mapped file in place
changes verified vectors, or kills the process that reads them. Importing this module imports neither torch
nor vllm.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from vllm_steer.packs.strict_json import parse_json

MAX_HEADER_BYTES: Final = 32 * 2**20
MAX_HEADER_VALUES: Final = 1_000_000
# Linux reads at most 2 GiB less a page at once; smaller pieces are as fast and stay in the cache.
_PIECE: Final = 4 * 2**20
_DTYPES: Final = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}

Shape = tuple[int, int]


class Readable(Protocol):
    """An unbuffered binary file."""

    def readinto(self, buffer: Any, /) -> int | None: ...


def read_tensors(
    stream: Readable, size: int, wanted: Mapping[str, Shape]
) -> tuple[dict[str, NDArray[np.float32]], str]:
    """Reads a safetensors file that must hold exactly the wanted float32 tensors.

    Args:
        stream: The file, at its start.
        size: Its size in bytes, as the file system gives it.
        wanted: Shape of each tensor by name.

    Returns:
        Tensor name to a read-only float32 array of its shape, all views of one buffer; and the
        sha256 of the whole file. The values are not yet checked.

    Raises:
        ValueError: The file is not of that form. Only its header has been read then, unless the file became
            shorter during reading.
    """
    digest = hashlib.sha256()
    prefix = _read(stream, min(8, size), digest)
    length = int.from_bytes(prefix.tobytes(), "little")
    if size < 8 or length > size - 8:
        raise ValueError("not a readable safetensors file (its header is longer than the file)")
    if length > MAX_HEADER_BYTES:
        raise ValueError(
            f"not a readable safetensors file (its header has {length} bytes; at most "
            f"{MAX_HEADER_BYTES} are allowed)"
        )
    header = _read(stream, length, digest).tobytes()
    starts = _layout(header, size - 8 - length, wanted)
    data = _read(stream, size - 8 - length, digest)
    data.flags.writeable = False
    values = data.view("<f4")
    tensors = {
        name: values[starts[name] : starts[name] + rows * width].reshape(rows, width)
        for name, (rows, width) in wanted.items()
    }
    return tensors, digest.hexdigest()


def _layout(header: bytes, data_bytes: int, wanted: Mapping[str, Shape]) -> dict[str, int]:
    """Returns the index of each tensor's first float32, after checking every claim of the header."""
    try:
        entries = parse_json(header, MAX_HEADER_VALUES)
    except ValueError as error:
        raise ValueError(f"not a readable safetensors file ({error})") from None
    if not isinstance(entries, dict):
        raise ValueError("not a readable safetensors file (its header is not an object)")
    entries.pop("__metadata__", None)
    if wanted.keys() != entries.keys():
        missing, extra = (
            sorted(one.keys() - other.keys())[:5]
            for one, other in ((wanted, entries), (entries, wanted))
        )
        raise ValueError(
            f"tensors must be the manifest's directions; missing {missing}, "
            f"not in the manifest {[name[:128] for name in extra]}"
        )
    spans = {name: _span(name, entries[name], shape) for name, shape in wanted.items()}
    end = 0
    for start, stop in sorted(spans.values()):
        if start != end:
            raise ValueError("not a readable safetensors file (its tensors overlap or leave gaps)")
        end = stop
    if end != data_bytes:
        raise ValueError(
            f"not a readable safetensors file (its tensors take {end} bytes, but the file has {data_bytes})"
        )
    return {name: start // 4 for name, (start, _) in spans.items()}


def _span(name: str, entry: Any, shape: Shape) -> tuple[int, int]:
    fields = entry if isinstance(entry, dict) else {}
    dtype, found = fields.get("dtype"), fields.get("shape")
    if dtype != "F32" or found != list(shape):
        raise ValueError(
            f"direction {name!r} is {_DTYPES.get(str(dtype), str(dtype)[:20])} of shape "
            f"{_shown(found)}; the manifest says float32 of shape {shape}"
        )
    offsets = fields.get("data_offsets")
    size = 4 * shape[0] * shape[1]
    if (
        not isinstance(offsets, list)
        or [type(offset) for offset in offsets] != [int, int]
        or offsets[1] - offsets[0] != size
    ):
        raise ValueError(f"direction {name!r} must have data_offsets {size} bytes apart")
    return offsets[0], offsets[1]


def _shown(shape: Any) -> str:
    if isinstance(shape, list) and len(shape) <= 8:
        return str(tuple(shape))[:100]
    return "an invalid shape"


def _read(stream: Readable, count: int, digest: Any) -> NDArray[np.uint8]:
    """Reads ``count`` bytes, each piece hashed while it is in the processor's cache."""
    data = np.empty(count, dtype=np.uint8)
    view, done = data.data, 0
    while done < count:
        got = stream.readinto(view[done : done + _PIECE])
        if not got:
            raise ValueError("became shorter while being read")
        digest.update(view[done : done + got])
        done += got
    return data
