"""Rows and columns of the arrays of a file that may be larger than memory: safetensors and NumPy's ``.npz``.

Only what is asked for is kept; nothing is unpickled.
"""

from __future__ import annotations

import math
import os
import stat
import tokenize
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Final, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from vllm_steer.errors import ConversionError, one_line

MAX_BYTES: Final = 2**36
_BLOCK_BYTES: Final = 2**26
# Weights hardly compress; an archive that unpacks to this many times its size is no file of weights.
_MOST_PACKED: Final = 8
_LINE: Final = 200
_SAFETENSORS: Final = {"F16", "BF16", "F32", "F64"}
Array = NDArray[np.float64]


class Arrays(Protocol):
    """The arrays of an open file."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of each array by its name."""
        ...

    def take(self, name: str, ids: Sequence[int], axis: int) -> Array:
        """Returns some entries of an array along an axis, ``[ids, …]``, float64."""
        ...


@contextmanager
def opened_arrays(file: Path) -> Iterator[Arrays]:
    """Opens a file of arrays by its content.

    Raises:
        ConversionError: It is neither of the two formats, damaged, or holds anything but floats.
    """
    try:
        found = file.stat()
        if not stat.S_ISREG(found.st_mode):
            raise ConversionError(f"{file}: is not a regular file")
        if found.st_size > MAX_BYTES:
            raise ConversionError(f"{file}: larger than the limit of {MAX_BYTES} bytes")
        with file.open("rb") as stream:
            archive = stream.read(4) == b"PK\x03\x04"
        if archive:
            with zipfile.ZipFile(file) as opened:
                yield _Npz(file, opened)
        else:
            with safe_open(os.fspath(file), framework="pt") as held:
                yield _Safetensors(file, held)
    # A header of .npy is a literal of Python, whose parser has errors of its own.
    except (SafetensorError, OSError, ValueError, EOFError, RuntimeError, MemoryError, SyntaxError,
            tokenize.TokenError, zipfile.BadZipFile, zlib.error) as error:  # fmt: skip
        raise ConversionError(
            f"{file}: not readable as safetensors or as an archive of np.savez ({one_line(error, _LINE)})"
        ) from error


class _Safetensors:
    def __init__(self, file: Path, held: Any) -> None:
        self._held = held
        self.shapes: dict[str, tuple[int, ...]] = {}
        for name in held.keys():  # noqa: SIM118
            part = held.get_slice(name)
            _check_kind(file, name, part.get_dtype() in _SAFETENSORS, part.get_dtype())
            self.shapes[name] = tuple(part.get_shape())

    def take(self, name: str, ids: Sequence[int], axis: int) -> Array:
        part, shape = self._held.get_slice(name), self.shapes[name]
        if axis == 0:
            rows = [part[number : number + 1].to(torch.float64) for number in ids]
            return torch.cat(rows).numpy()
        step = max(1, _BLOCK_BYTES // (8 * shape[1]))
        blocks = [
            part[start : start + step][:, list(ids)].to(torch.float64)
            for start in range(0, shape[0], step)
        ]
        return torch.cat(blocks).T.contiguous().numpy()


class _Npz:
    def __init__(self, file: Path, archive: zipfile.ZipFile) -> None:
        self._file, self._archive = file, archive
        members = archive.infolist()
        if sum(member.file_size for member in members) > _MOST_PACKED * file.stat().st_size:
            raise ConversionError(
                f"{file}: its archive claims far more bytes than the file has; save it with np.savez"
            )
        self.shapes: dict[str, tuple[int, ...]] = {}
        for member in members:
            name = member.filename.removesuffix(".npy")
            if name == member.filename or name in self.shapes:
                raise ConversionError(
                    f"{file}: its archive holds {member.filename[:80]!r}, which np.savez does not write"
                )
            with archive.open(member) as stream:
                self.shapes[name], _, dtype = self._header(name, stream)
                if (
                    member.file_size - stream.tell()
                    != math.prod(self.shapes[name]) * dtype.itemsize
                ):
                    raise ConversionError(f"{file}: {name[:80]!r} is not as long as its shape says")

    def _header(self, name: str, stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
        version = np.lib.format.read_magic(stream)
        read = {(1, 0): np.lib.format.read_array_header_1_0,
                (2, 0): np.lib.format.read_array_header_2_0}.get(version)  # fmt: skip
        if read is None:
            raise ValueError(f"version {version} of .npy")
        shape, fortran, dtype = read(stream)
        _check_kind(self._file, name, dtype.kind == "f" and dtype.itemsize in (2, 4, 8), dtype)
        return shape, fortran, dtype

    def take(self, name: str, ids: Sequence[int], axis: int) -> Array:
        with self._archive.open(f"{name}.npy") as stream:
            shape, fortran, dtype = self._header(name, stream)
            if fortran and len(shape) > 1:
                # Stored as its transpose.
                shape, axis = shape[::-1], len(shape) - 1 - axis
            width = math.prod(shape[1:])
            step = max(1, _BLOCK_BYTES // (dtype.itemsize * max(1, width)))
            kept, wanted = [], np.asarray(ids, dtype=np.int64)
            found = np.empty((len(ids), *shape[1:]), dtype=np.float64)
            for start in range(0, shape[0], step):
                count = min(step, shape[0] - start)
                data = stream.read(count * width * dtype.itemsize)
                block = np.frombuffer(data, dtype=dtype).reshape(count, *shape[1:])
                if axis == 0:
                    here = (wanted >= start) & (wanted < start + count)
                    found[here] = block[wanted[here] - start]
                else:
                    kept.append(block[:, wanted].astype(np.float64))
        return found if axis == 0 else np.ascontiguousarray(np.concatenate(kept).T)


def _check_kind(file: Path, name: str, is_float: bool, kind: object) -> None:
    if not is_float:
        raise ConversionError(
            f"{file}: {name[:80]!r} holds {kind}; an autoencoder has floats of 16, 32 or 64 bits"
        )
