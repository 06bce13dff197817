"""Steering packs on disk: the one contract between extraction and serving.

A pack is a directory with two files. ``steering_config.json`` is the manifest: the model that the
directions belong to, where they are added, how strongly, and how they were learned.
``steering_vectors.safetensors`` holds one float32 tensor per direction, of shape
``[len(layers), hidden_size]``. Layer k is the output of decoder block k, 0-based, which is
``hidden_states[k + 1]`` in Hugging Face's terms except for the last block, whose output is taken
before the final norm.

Loading verifies everything and imports neither torch nor vllm.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load as load_safetensors
from safetensors.numpy import save as save_safetensors

from vllm_steer.errors import PackError
from vllm_steer.manifest import (
    SCHEMA_VERSION,
    VECTORS_FILE,
    DirectionRecord,
    Manifest,
    MethodRecord,
    ModelIdentity,
    PackName,
    TensorFile,
    explain_faults,
)

__all__ = [
    "DirectionRecord",
    "Manifest",
    "MethodRecord",
    "ModelIdentity",
    "PackName",
    "SteeringPack",
    "direction_digest",
    "load_pack",
    "replace_file",
    "write_pack",
]

MANIFEST_FILE = "steering_config.json"
MAX_MANIFEST_BYTES = 64 * 2**20
MAX_VECTORS_BYTES = 8 * 2**30


@dataclass(frozen=True, eq=False)
class SteeringPack:
    """A verified pack in memory.

    Attributes:
        path: Directory that it was read from.
        manifest: Its manifest.
        vectors: Direction name to float32 array of shape ``[len(layers), hidden_size]``, read-only.
    """

    path: Path
    manifest: Manifest
    vectors: Mapping[str, np.ndarray]

    @property
    def name(self) -> str:
        """Name of the pack, as requests give it."""
        return self.manifest.name

    @cached_property
    def directions(self) -> dict[str, DirectionRecord]:
        """Records of the directions by name."""
        return {direction.name: direction for direction in self.manifest.directions}

    @cached_property
    def digests(self) -> dict[str, str]:
        """Content digest of each direction: sha256 over its layers and vector bytes."""
        return {
            name: direction_digest(record.layers, self.vectors[name])
            for name, record in self.directions.items()
        }


def direction_digest(layers: Sequence[int], vector: np.ndarray) -> str:
    """Returns the content identity of a direction: the same values have the same digest everywhere.

    Args:
        layers: Layers that the rows belong to.
        vector: Array of shape ``[len(layers), hidden_size]``.
    """
    digest = hashlib.sha256(json.dumps([list(layers), list(vector.shape)]).encode())
    digest.update(np.ascontiguousarray(vector, dtype="<f4").tobytes())
    return digest.hexdigest()


def write_pack(
    path: str | os.PathLike[str],
    *,
    name: str,
    model: ModelIdentity,
    directions: Sequence[DirectionRecord],
    vectors: Mapping[str, np.ndarray],
    method: MethodRecord,
    residual_norms: Mapping[int, float],
) -> SteeringPack:
    """Writes a pack and reads it back, so that what was written is known to load.

    Each file is replaced atomically, the manifest last; a pack torn by a crash in between fails its
    digest check and is refused.

    Args:
        path: Directory of the pack; made if missing.
        name: Name of the pack.
        model: The model that the directions belong to.
        directions: Their records.
        vectors: Direction name to array of shape ``[len(layers), hidden_size]``.
        method: How they were learned.
        residual_norms: Mean residual norm by layer.

    Raises:
        PackError: Something does not fit together.
    """
    root = Path(path)
    data = save_safetensors(
        {key: np.ascontiguousarray(value, dtype=np.float32) for key, value in vectors.items()}
    )
    try:
        manifest = Manifest(
            schema_version=SCHEMA_VERSION,
            name=name,
            model=model,
            layer_convention="block_output_0_based",
            hook_point="residual_stream_after_block",
            directions=list(directions),
            method=method,
            residual_norms={
                str(layer): float(norm) for layer, norm in sorted(residual_norms.items())
            },
            tensors=TensorFile(
                file=VECTORS_FILE, sha256=hashlib.sha256(data).hexdigest(), size=len(data)
            ),
        )
    except ValidationError as error:
        raise PackError(f"pack {name!r} cannot be written: {explain_faults(error)}") from error
    _checked_vectors(root, manifest, data)
    root.mkdir(parents=True, exist_ok=True)
    replace_file(root / VECTORS_FILE, data)
    replace_file(root / MANIFEST_FILE, (manifest.model_dump_json(indent=2) + "\n").encode())
    return load_pack(root)


def load_pack(path: str | os.PathLike[str]) -> SteeringPack:
    """Reads a pack and verifies every statement that its manifest makes.

    Args:
        path: Directory of the pack.

    Raises:
        PackError: A file is missing, malformed or altered, or the tensors are not what the manifest
            says; the message names the file and the fault.
    """
    root = Path(path)
    if not root.is_dir():
        raise PackError(
            f"no steering pack at {str(path)!r}: that is not a directory; give the directory that "
            f"holds {MANIFEST_FILE}"
        )
    try:
        manifest = Manifest.model_validate_json(_read(root / MANIFEST_FILE, MAX_MANIFEST_BYTES))
    except ValidationError as error:
        raise PackError(f"{root / MANIFEST_FILE}: {explain_faults(error)}") from error
    data = _read(root / VECTORS_FILE, min(manifest.tensors.size, MAX_VECTORS_BYTES))
    if hashlib.sha256(data).hexdigest() != manifest.tensors.sha256:
        raise PackError(
            f"{root / VECTORS_FILE}: sha256 differs from the manifest's, so the file is damaged or not "
            f"the one that was extracted; copy the pack again or extract it anew"
        )
    return SteeringPack(root, manifest, _checked_vectors(root, manifest, data))


def _checked_vectors(root: Path, manifest: Manifest, data: bytes) -> dict[str, np.ndarray]:
    """Returns the tensors in ``data`` after checking them against the manifest."""
    file = root / VECTORS_FILE
    try:
        vectors: dict[str, np.ndarray] = load_safetensors(data)
    except (SafetensorError, KeyError, ValueError) as error:
        raise PackError(f"{file}: not a readable safetensors file ({error})") from error
    named = {direction.name for direction in manifest.directions}
    if named != set(vectors):
        missing, extra = sorted(named - set(vectors)), sorted(set(vectors) - named)
        raise PackError(
            f"{file}: tensors must be the manifest's directions; missing {missing[:5]}, "
            f"not in the manifest {extra[:5]}"
        )
    for direction in manifest.directions:
        vector, shape = vectors[direction.name], (len(direction.layers), manifest.model.hidden_size)
        if vector.dtype != np.float32 or vector.shape != shape:
            raise PackError(
                f"{file}: direction {direction.name!r} is {vector.dtype} of shape {vector.shape}; the "
                f"manifest wants float32 of shape {shape}"
            )
        if not np.isfinite(vector).all():
            raise PackError(
                f"{file}: direction {direction.name!r} has NaN or Inf; every value must be finite"
            )
        if not vector.any(axis=1).all():
            raise PackError(
                f"{file}: direction {direction.name!r} is zero at a layer, where it could never steer; "
                f"leave that layer out"
            )
        vector.flags.writeable = False
    return vectors


def _read(file: Path, limit: int) -> bytes:
    try:
        with file.open("rb") as stream:
            data = stream.read(limit + 1)
    except OSError as error:
        raise PackError(
            f"{file}: cannot be read ({error.strerror}); a steering pack holds {MANIFEST_FILE} and "
            f"{VECTORS_FILE}"
        ) from error
    if len(data) > limit:
        raise PackError(f"{file}: larger than the {limit} bytes that it may have")
    return data


def replace_file(file: Path, data: bytes) -> None:
    """Writes a file atomically: at any moment its whole old or its whole new content is there."""
    with tempfile.NamedTemporaryFile(
        dir=file.parent, prefix=f".{file.name}.", delete=False
    ) as stream:
        try:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
            os.chmod(stream.name, 0o644)
            os.replace(stream.name, file)
        except BaseException:
            os.unlink(stream.name)
            raise
