"""Vector files, recognised by their first bytes, to named arrays; nothing is unpickled.

GGUF and PyTorch have separate modules; safetensors, NumPy's ``.npy`` and JSON are read here.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from safetensors import SafetensorError, safe_open

from vllm_steer.errors import ConversionError, one_line
from vllm_steer.offline.convert.contents import Contents, Floats, flatten
from vllm_steer.offline.convert.gguf_file import read_gguf
from vllm_steer.offline.convert.torch_file import ZIP, float_array, read_torch
from vllm_steer.offline.convert.vectors import FORMATS
from vllm_steer.offline.gguf.header import MAGIC

_NPY: Final = b"\x93NUMPY"
_PICKLE: Final = b"\x80"
# Characters of another library's message.
_LINE: Final = 200
_MAX_JSON_BYTES: Final = 2**28
_BOM: Final = b"\xef\xbb\xbf"


def read_contents(file: Path) -> Contents:
    """Reads a vector file, whatever its extension.

    Raises:
        ConversionError: Its format is not supported, or it is damaged, or holds something other than float
            arrays.
    """
    try:
        with file.open("rb") as stream:
            head = stream.read(64)
    except OSError as error:
        raise ConversionError(f"{file}: cannot be read ({error.strerror}); {FORMATS}") from error
    if head.startswith(MAGIC):
        return read_gguf(file)
    if head.startswith(ZIP):
        return read_torch(file)
    if head.startswith(_NPY):
        return _read_npy(file)
    if head.startswith(_PICKLE):
        raise ConversionError(
            f"{file}: is a Python pickle, which may hold code and is never opened. Where it was made, save only its tensors"
            f': torch.save({{k: torch.as_tensor(v) for k, v in D.items()}}, "vector.pt"), D being vector.directions of '
            f"repeng and dialz or vector.layer_activations of steering-vectors; a file of torch.save before PyTorch 1.6: "
            f'torch.save(torch.load("{file.name}", weights_only=True), "vector.pt")'
        )
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 2**32:
        return _read_safetensors(file)
    if head.removeprefix(_BOM).lstrip()[:1] in (b"{", b"["):
        return _read_json(file)
    raise ConversionError(
        f"{file}: {'is empty' if not head else 'is of no known format'}; {FORMATS}"
    )


def _read_npy(file: Path) -> Contents:
    try:
        # Not mapped, since a header that claims more than there is would be believed.
        array = np.load(file, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError, SyntaxError, MemoryError, OverflowError) as error:
        raise ConversionError(
            f"{file}: holds Python objects, which are never unpickled, or is damaged ({one_line(error, _LINE)}); save "
            f'only floats: np.save("vector.npy", np.asarray(vector, dtype="float32"))'
        ) from error
    if array.dtype.kind != "f" or array.dtype.itemsize not in (2, 4, 8):
        raise ConversionError(
            f"{file}: holds {array.dtype}; vectors must be floats: "
            f'np.save("vector.npy", np.asarray(vector, dtype="float32"))'
        )
    return Contents("npy", {(): np.array(array, dtype=array.dtype.newbyteorder("="))}, {})


def _read_safetensors(file: Path) -> Contents:
    try:
        with safe_open(os.fspath(file), framework="pt") as stream:
            metadata = stream.metadata() or {}
            tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise ConversionError(
            f"{file}: not a readable safetensors file ({one_line(error, _LINE)}); fetch or save it again"
        ) from error
    found = flatten(file, "safetensors", tensors, lambda tensor: float_array(file, tensor))
    return Contents(
        found.format, found.arrays, found.layers, _row_layers(file, metadata.get("layers"))
    )


def _row_layers(file: Path, text: str | None) -> tuple[int, ...] | None:
    """Layers of the rows, from the metadata of vectors for upload."""
    if text is None:
        return None
    try:
        layers = json.loads(text)
    except ValueError:
        layers = None
    if not isinstance(layers, list) or not all(type(layer) is int for layer in layers):
        raise ConversionError(
            f"{file}: its metadata say layers {text[:80]!r}; it must be a list such as [10, 11]"
        )
    return tuple(layers)


def _read_json(file: Path) -> Contents:
    if file.stat().st_size > _MAX_JSON_BYTES:
        raise ConversionError(
            f"{file}: larger than the limit of {_MAX_JSON_BYTES} bytes for JSON; save it as safetensors"
        )
    try:
        content = json.loads(file.read_text("utf-8-sig"), object_pairs_hook=_distinct)
    except (ValueError, RecursionError) as error:
        raise ConversionError(
            f'{file}: not readable as JSON ({one_line(error, _LINE)}); write {{"12": [0.1, ...]}}, a layer to its numbers'
        ) from error
    return flatten(file, "json", content, lambda value: _numbers(file, value))


def _distinct(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key occurs twice in an object")
    return found


def _numbers(file: Path, value: Any) -> Floats | None:
    """A list of numbers, or of lists of them, as float64; None if it is not a list."""
    if not isinstance(value, list) or (value and all(isinstance(item, str) for item in value)):
        return None
    try:
        array = np.array(value)
    except (ValueError, OverflowError):
        array = np.array(None)
    if array.dtype.kind not in "fiu" and array.size:
        raise ConversionError(
            f"{file}: holds a list that is not of numbers, or of rows of different lengths; write each vector as a list of "
            f'hidden_size numbers: {{"12": [0.1, ...]}}'
        )
    return array.astype(np.float64)
