"""The common part of all formats: one direction as checked vectors by layer."""

from __future__ import annotations

import hashlib
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from vllm_steer.errors import ConversionError
from vllm_steer.packs.pack import ModelIdentity

# 128 layers of width 2,097,152; a file beyond it is a model, not a vector.
MAX_FILE_BYTES: Final = 2**30
MAX_LAYERS: Final = 10_000
MAX_WIDTH: Final = 2**20
FORMATS: Final = (
    "give a GGUF control vector, a torch.save file, safetensors, NumPy's .npy or JSON of numbers"
)


@dataclass(frozen=True, eq=False)
class VectorFile:
    """A direction as another tool stored it.

    Attributes:
        format: ``gguf``, ``pt``, ``safetensors``, ``npy`` or ``json``.
        sha256: Digest of the file.
        vectors: Layer to float32 ``[hidden_size]``, finite and non-zero, ascending. Layer k is the
            output of decoder block k, 0-based.
        model_hint: Model type that the file names, if any.
    """

    format: str
    sha256: str
    vectors: Mapping[int, NDArray[np.float32]]
    model_hint: str | None = None


def file_digest(file: Path) -> str:
    """Returns the sha256 of a file, after checking that it is a regular file within the size limit.

    Raises:
        ConversionError: There is no such file, or it is too large.
    """
    try:
        found = file.stat()
        if not stat.S_ISREG(found.st_mode):
            kind = "a directory" if file.is_dir() else "not a regular file"
            raise ConversionError(f"{file}: is {kind}; {FORMATS}")
        if found.st_size > MAX_FILE_BYTES:
            raise ConversionError(
                f"{file}: larger than the limit of {MAX_FILE_BYTES} bytes; save the vectors of only one "
                f"direction"
            )
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise ConversionError(f"{file}: cannot be read ({error.strerror}); {FORMATS}") from error


def check_fit(
    file: Path, layers: Iterable[int], widths: Iterable[int], model: ModelIdentity
) -> None:
    """Refuses vectors that do not fit the model, before any is copied.

    Args:
        file: The file, for messages.
        layers: Layers of the vectors.
        widths: Number of values of each vector.
        model: The model.

    Raises:
        ConversionError: A width is not the model's hidden size, or a layer not one of its blocks.
    """
    if wrong := {*widths} - {model.hidden_size}:
        raise ConversionError(
            f"{file}: vectors have {sorted(wrong)[:5]} values; the model's hidden size is "
            f"{model.hidden_size}"
        )
    last = model.num_layers - 1
    if beyond := sorted(layer for layer in layers if not 0 <= layer <= last):
        raise ConversionError(
            f"{file}: has layers {beyond[:5]}; the model has layers 0 to {last}, each the output of a block. Where 0 are "
            f"the embeddings, save each under the layer before it; else keep those of the model with --layers"
        )


def checked(file: Path, rows: Mapping[int, NDArray[np.floating]]) -> dict[int, NDArray[np.float32]]:
    """Returns vectors as float32, ascending by layer; layers of zeros are left out.

    Args:
        file: The file, for messages.
        rows: Layer to ``[hidden_size]``, of any float dtype.

    Raises:
        ConversionError: A vector is not finite in float32, or every one is zero.
    """
    vectors = {}
    for layer, row in sorted(rows.items()):
        # A float64 beyond float32's range becomes infinite, which is refused below.
        with np.errstate(over="ignore"):
            vector = np.array(row, dtype=np.float32)
        if not np.isfinite(vector).all():
            raise ConversionError(
                f"{file}: the vector of layer {layer} has NaN or Inf; every value must be finite"
            )
        if vector.any():
            vectors[layer] = vector
    if not vectors:
        raise ConversionError(f"{file}: every vector is zero and has no effect")
    return vectors
