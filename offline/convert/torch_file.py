"""Vectors saved with ``torch.save``, read with ``weights_only=True`` and nothing else.

A file may hold

- a dict of layer to vector ``[hidden_size]``, layers as integers, their digits or the names of modules
  (``layer_12``, ``model.layers.12``), or such a dict under the key ``directions``, as the fields of
  repeng's control vectors are; or ``{"layer": 12, "vector": ...}``;
- a matrix ``[layers, hidden_size]``, row i for the i-th of the layers given or, where the rows are as
  many as the model's blocks, for layer i; where they are one more, they are hidden states with the
  embeddings in front, as persona vectors are: row i + 1 for layer i, and the last is left out, since
  Hugging Face gives it after the final norm;
- one vector ``[hidden_size]``, as EasySteer saves them, for each of the layers given, or for the one that
  the file's name says, as contrastive activation addition saves them (``vec_layer_13.pt``).

Layer k is the output of decoder block k, 0-based. A vector ``[1, hidden_size]`` is one of ``[hidden_size]``.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from offline.convert.vectors import (
    MAX_FILE_BYTES,
    MAX_LAYERS,
    VectorFile,
    check_fit,
    checked,
    file_digest,
)
from vllm_steer.errors import ConversionError
from vllm_steer.pack import ModelIdentity

MAX_PICKLE_BYTES: Final = 2**20
MAX_MEMBERS: Final = 3 * MAX_LAYERS
_NUMBER: Final = r"(0|[1-9][0-9]{0,3})"
_MODULES: Final = r"(?:layers?|blocks?|blk|h)"
_LAYER: Final = re.compile(rf"(?:(?:[a-z_]+\.)*{_MODULES}[._-]?)?{_NUMBER}")
_LAYER_IN_NAME: Final = re.compile(rf"(?:^|[^a-z]){_MODULES}[ ._-]?{_NUMBER}(?![0-9])")
_ONE: Final = frozenset({"layer", "vector"})


def read_torch(file: Path, layers: Sequence[int] | None, model: ModelIdentity) -> VectorFile:
    """Reads a vector file of PyTorch.

    Args:
        file: The file, in the zip format that ``torch.save`` writes since PyTorch 1.6.
        layers: Layers that the rows of a matrix, or the one vector, belong to; None for all.
        model: The model that they are for.

    Raises:
        ConversionError: It holds anything but tensors in one of the forms above, or they do not fit
            the model.
    """
    digest = file_digest(file)
    _check_archive(file)
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    # The restricted unpickler raises whatever the damaged or foreign content leads to.
    except Exception as error:
        raise ConversionError(
            f"{file}: holds more than tensors, or is damaged, and code is never unpickled "
            f"({str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__}); "
            f"save plain tensors: torch.save({{layer: torch.as_tensor(vector)}}, file)"
        ) from error
    hint = None
    if isinstance(content, dict) and "directions" in content:
        hint = content.get("model_type")
        content = content["directions"]
    rows = _by_layer(file, content, layers, model.num_layers)
    check_fit(file, rows, (row.shape[-1] for row in rows.values()), model)
    arrays = {layer: _array(row) for layer, row in rows.items()}
    return VectorFile("pt", digest, checked(file, arrays), hint if isinstance(hint, str) else None)


def _check_archive(file: Path) -> None:
    """Refuses what is no plain archive of ``torch.save``, before anything in it is interpreted."""
    try:
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError) as error:
        raise ConversionError(
            f"{file}: neither a GGUF file nor what torch.save writes since PyTorch 1.6 ({error}); save "
            f"it anew with a current PyTorch"
        ) from error
    if len(members) > MAX_MEMBERS or any(
        member.compress_type != zipfile.ZIP_STORED for member in members
    ):
        raise ConversionError(f"{file}: its archive is compressed or has {len(members)} members")
    if sum(member.file_size for member in members) > min(MAX_FILE_BYTES, file.stat().st_size):
        raise ConversionError(f"{file}: its archive claims more bytes than the file has")
    if any(
        member.filename.endswith(".pkl") and member.file_size > MAX_PICKLE_BYTES
        for member in members
    ):
        raise ConversionError(f"{file}: holds more objects than a vector file has")


def _by_layer(
    file: Path, content: Any, layers: Sequence[int] | None, num_layers: int
) -> dict[int, Tensor]:
    if isinstance(content, dict) and content.keys() == _ONE:
        layer, vector = content["layer"], _tensor(file, content["vector"], 1)
        return {_layer(file, layer): vector}
    if isinstance(content, dict) and content:
        found = {_layer(file, key): _tensor(file, value, 1) for key, value in content.items()}
        if len(found) < len(content):
            raise ConversionError(f"{file}: gives a layer twice")
        return found
    if isinstance(content, Tensor) and (content.dim() == 1 or len(content) == 1 != num_layers):
        layers = _layers_of_one(file, layers)
        if layers is None:
            raise ConversionError(
                f"{file}: holds one vector for no layer in particular; name its layers with --layers"
            )
        return dict.fromkeys(layers, _tensor(file, content, 1))
    if isinstance(content, Tensor):
        matrix = _tensor(file, content, 2)
        if layers is None and len(matrix) == num_layers + 1:
            return dict(enumerate(matrix[1:-1]))
        given = range(num_layers) if layers is None else layers
        if len(matrix) != len(given):
            raise ConversionError(
                f"{file}: has {len(matrix)} rows for {len(given)} "
                f"{'blocks of the model' if layers is None else 'layers given'}; name the layer of each "
                f"row with --layers"
            )
        return dict(zip(given, matrix, strict=True))
    raise ConversionError(
        f"{file}: holds a {type(content).__name__}; it must be a tensor [layers, hidden_size], a vector "
        f"[hidden_size], or a dict of layer to vector"
    )


def _layers_of_one(file: Path, layers: Sequence[int] | None) -> Sequence[int] | None:
    """The layers of a file with one vector, which its name may say.

    Raises:
        ConversionError: The name and what was given differ.
    """
    named = _LAYER_IN_NAME.search(file.stem.lower())
    if named is None:
        return layers
    layer = int(named[1])
    if layers is not None and list(layers) != [layer]:
        raise ConversionError(
            f"{file}: holds one vector, by its name for layer {layer}, and --layers says {[*layers]}; leave --layers out. "
            f"Each file makes a direction of its own: for one with several layers, save them as one file, "
            f"torch.save({{{layer}: vector, ...}}, file)"
        )
    return [layer]


def _layer(file: Path, key: Any) -> int:
    if type(key) in (int, str) and (found := _LAYER.fullmatch(str(key))):
        return int(found[1])
    raise ConversionError(
        f"{file}: has a key {str(key)[:80]!r} where a layer belongs, 0 to {MAX_LAYERS - 1}"
    )


def _tensor(file: Path, value: Any, dimensions: int) -> Tensor:
    """Returns a value of the file after checking that it is a float tensor as large as it claims."""
    if isinstance(value, Tensor) and value.dim() == dimensions + 1 and len(value) == 1:
        value = value[0]
    if (
        not isinstance(value, Tensor)
        or value.layout != torch.strided
        or value.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
        or value.dim() != dimensions
    ):
        what = (
            f"{value.dtype} {list(value.shape)}"
            if isinstance(value, Tensor)
            else type(value).__name__
        )
        raise ConversionError(
            f"{file}: holds {what}; vectors must be float tensors of {dimensions} dimension(s)"
        )
    # Strides of zero make any size of a single number.
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        raise ConversionError(f"{file}: a tensor is larger than what is stored of it")
    return value.detach()


def _array(vector: Tensor) -> NDArray[np.floating]:
    # numpy has no bfloat16.
    array: NDArray[np.floating] = (
        vector if vector.dtype == torch.float64 else vector.float()
    ).numpy()
    return array
