"""The header of a GGUF file, read within bounds.

The libraries that read GGUF files trust the lengths in the header; checked here first, these cannot make them
read past the file or loop for long.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import BinaryIO, Final

MAGIC: Final = b"GGUF"
# Values by their type in GGUF; strings and arrays tell their own length.
_SCALARS: Final = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}
_STRING: Final = 8
_ARRAY: Final = 9
_ALIGNMENT: Final = 32

Scalar = str | int | float


@dataclass(frozen=True)
class Limits:
    """Limits on a header's claims.

    Attributes:
        fields: Number of fields.
        tensors: Number of tensors.
        dimensions: Of a tensor.
        array: Elements of an array.
        string: Bytes of a string.
    """

    fields: int
    tensors: int
    dimensions: int
    array: int
    string: int


@dataclass(frozen=True)
class TensorInfo:
    """A tensor of the file.

    Attributes:
        name: Its name.
        shape: Its dimensions as GGUF counts them, the innermost first.
        kind: Number of its type in GGUF.
        offset: Where it begins, counted from the beginning of the data.
    """

    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int


@dataclass(frozen=True)
class Header:
    """The part of a file before its data.

    Attributes:
        fields: Name to value, of the fields that are no arrays.
        tensors: The tensors in their order.
        data_start: Where the data begins, in bytes.
    """

    fields: Mapping[str, Scalar]
    tensors: tuple[TensorInfo, ...]
    data_start: int


def read_header(stream: BinaryIO, limits: Limits) -> Header:
    """Reads a header and stops where the data begins.

    Args:
        stream: The file, at its beginning.
        limits: What it may claim.

    Raises:
        ValueError: It is not a GGUF file, it ends early, or it claims more than allowed.
    """
    if stream.read(4) != MAGIC:
        raise ValueError("it does not begin with GGUF")
    version, tensor_count, field_count = struct.unpack("<IQQ", _take(stream, 20))
    if version not in (2, 3):
        raise ValueError(f"version {version} is neither 2 nor 3 in little endian")
    if tensor_count > limits.tensors or field_count > limits.fields:
        raise ValueError(f"it claims {tensor_count} tensors and {field_count} fields")
    fields: dict[str, Scalar] = {}
    for _ in range(field_count):
        name = _string(stream, limits)
        value = _value(stream, _number(stream, "<I"), limits)
        if value is not None:
            fields[name] = value
    tensors = tuple(_tensor(stream, limits) for _ in range(tensor_count))
    alignment = fields.get("general.alignment", _ALIGNMENT)
    if not isinstance(alignment, int) or alignment <= 0:
        raise ValueError(f"its data is aligned to {alignment!r}")
    return Header(fields, tensors, -(-stream.tell() // alignment) * alignment)


def _tensor(stream: BinaryIO, limits: Limits) -> TensorInfo:
    name = _string(stream, limits)
    dimensions = _number(stream, "<I")
    if dimensions > limits.dimensions:
        raise ValueError(
            f"a tensor has {dimensions} dimensions where {limits.dimensions} are the most"
        )
    shape = struct.unpack(f"<{dimensions}Q", _take(stream, 8 * dimensions))
    kind, offset = struct.unpack("<IQ", _take(stream, 12))
    return TensorInfo(name, shape, kind, offset)


def _value(stream: BinaryIO, kind: int, limits: Limits) -> Scalar | None:
    """Reads a value; returns None for an array, which is skipped."""
    if kind == _STRING:
        return _string(stream, limits)
    if kind in _SCALARS:
        (value,) = struct.unpack(_SCALARS[kind], _take(stream, struct.calcsize(_SCALARS[kind])))
        return value
    if kind != _ARRAY:
        raise ValueError(f"a value has the unknown type {kind}")
    element, count = struct.unpack("<IQ", _take(stream, 12))
    if count > limits.array or element == _ARRAY:
        raise ValueError(f"an array claims {count} elements; this file may have no such array")
    if element in _SCALARS:
        _take(stream, count * struct.calcsize(_SCALARS[element]))
    else:
        for _ in range(count):
            _value(stream, element, limits)
    return None


def _string(stream: BinaryIO, limits: Limits) -> str:
    length = _number(stream, "<Q")
    if length > limits.string:
        raise ValueError(f"a string claims {length} bytes")
    return _take(stream, length).decode()


def _number(stream: BinaryIO, form: str) -> int:
    return int(struct.unpack(form, _take(stream, struct.calcsize(form)))[0])


def _take(stream: BinaryIO, count: int) -> bytes:
    data = stream.read(count)
    if len(data) < count:
        raise ValueError("it is truncated")
    return data
