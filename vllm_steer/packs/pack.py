"""Steering packs on disk: the contract between extraction and serving.

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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError
from safetensors.numpy import save as save_safetensors

from vllm_steer.errors import PackError, explain_faults
from vllm_steer.fields import PackName
from vllm_steer.operations import FormChoice
from vllm_steer.packs.calibration import Calibration, CalibrationPoint, raw_dose
from vllm_steer.packs.files import (
    opened,
    read_manifest,
    replace_file,
    replace_pack,
    staged_name,
)
from vllm_steer.packs.hub import hub_snapshot, resolve_pack
from vllm_steer.packs.manifest import (
    MANIFEST_FILE,
    MAX_MANIFEST_BYTES,
    SCHEMA_VERSION,
    VECTORS_FILE,
    DirectionRecord,
    Manifest,
    MethodRecord,
    ModelIdentity,
    Prefix,
    TensorFile,
    parse_manifest,
)
from vllm_steer.packs.probe import Probe, ProbeLayer, ProbeThreshold
from vllm_steer.packs.tensor_file import read_tensors

__all__ = [
    "MANIFEST_FILE",
    "VECTORS_FILE",
    "Calibration",
    "CalibrationPoint",
    "DirectionRecord",
    "FormChoice",
    "Manifest",
    "MethodRecord",
    "ModelIdentity",
    "PackName",
    "Prefix",
    "Probe",
    "ProbeLayer",
    "ProbeThreshold",
    "SteeringPack",
    "direction_digest",
    "load_pack",
    "raw_dose",
    "replace_file",
    "resolve_pack",
    "update_records",
    "write_pack",
]

# Vector lengths per layer whose squares fit float32, with room for sums of them.
MIN_LENGTH, MAX_LENGTH = 1e-18, 1e18
# How often a pack is reread if it is replaced while being read.
_ATTEMPTS = 5


@dataclass(frozen=True, eq=False)
class SteeringPack:
    """A verified pack in memory.

    Attributes:
        path: Its directory.
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

    @property
    def origin(self) -> str:
        """Its source: ``owner/name@commit`` for a pack from the hub, else its directory."""
        return str(hub_snapshot(Path(os.path.realpath(self.path))) or self.path)

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
    """Returns the content digest of a direction; equal values have equal digests everywhere.

    Args:
        layers: Layers that the rows belong to.
        vector: Array of shape ``[len(layers), hidden_size]``.
    """
    digest = hashlib.sha256(json.dumps([list(layers), list(vector.shape)]).encode())
    digest.update(np.ascontiguousarray(vector, dtype="<f4").reshape(-1).data)
    return digest.hexdigest()


@dataclass(frozen=True, eq=False)
class PackContent:
    """The content of a pack to write.

    Attributes:
        name: Name of the pack.
        model: The model that the directions belong to.
        directions: Their records.
        vectors: Direction name to array of shape ``[len(layers), hidden_size]``, written as float32.
        method: How they were learned.
        residual_norms: Median residual norm by layer.
    """

    name: str
    model: ModelIdentity
    directions: Sequence[DirectionRecord]
    vectors: Mapping[str, np.ndarray]
    method: MethodRecord
    residual_norms: Mapping[int, float]


def write_pack(path: str | os.PathLike[str], content: PackContent) -> SteeringPack:
    """Writes a pack and reads it back to verify that it loads.

    The directory holds either the old pack or the new one at every moment, even if this process is killed or
    the power fails; other files in it are kept.

    Args:
        path: Directory of the pack; created if missing.
        content: Its content.

    Raises:
        PackError: The content is inconsistent, or the directory cannot be written.
    """
    root, name = Path(path), content.name
    arrays = {
        key: np.ascontiguousarray(value, dtype="<f4") for key, value in content.vectors.items()
    }
    data = save_safetensors(arrays)
    digest = hashlib.sha256(data).hexdigest()
    try:
        manifest = Manifest(
            schema_version=SCHEMA_VERSION,
            name=name,
            model=content.model,
            layer_convention="block_output_0_based",
            hook_point="residual_stream_after_block",
            directions=list(content.directions),
            method=content.method,
            residual_norms={
                str(layer): float(norm) for layer, norm in sorted(content.residual_norms.items())
            },
            tensors=TensorFile(file=VECTORS_FILE, sha256=digest, size=len(data)),
        )
        written = (manifest.model_dump_json(indent=2) + "\n").encode()
        if len(written) > MAX_MANIFEST_BYTES:
            raise PackError(f"pack {name!r} cannot be written: its manifest is too large")
        parse_manifest(written)
    except ValidationError as error:
        raise PackError(
            f"pack {name!r} cannot be written: {explain_faults(error, 'manifest')}"
        ) from error
    except ValueError as error:
        raise PackError(f"pack {name!r} cannot be written: {error}") from error
    wanted = _shapes(manifest)
    if {key: array.shape for key, array in arrays.items()} != wanted:
        raise PackError(
            f"pack {name!r} cannot be written: the shapes of its vectors do not match its directions"
        )
    _check_values(root / VECTORS_FILE, arrays)
    replace_pack(root, written, data, digest)
    return load_pack(root)


def update_records(pack: SteeringPack, updates: Mapping[str, Mapping[str, Any]]) -> SteeringPack:
    """Writes what was measured of a pack's directions into its manifest, and leaves all else as it now is.

    Args:
        pack: The pack as it was measured.
        updates: Fields of the record of each direction.

    Returns:
        The pack, read back.

    Raises:
        PackError: The directory holds other vectors by now, or cannot be written.
    """
    now = load_pack(pack.path)
    if now.manifest.tensors != pack.manifest.tensors:
        raise PackError(
            f"{pack.path}: the pack's vectors were replaced while they were measured, so nothing was written; measure "
            f"them anew"
        )
    manifest = now.manifest
    return write_pack(
        now.path,
        PackContent(
            name=now.name,
            model=manifest.model,
            directions=[
                record.model_copy(update=updates.get(record.name, {}))
                for record in manifest.directions
            ],
            vectors=now.vectors,
            method=manifest.method,
            residual_norms={int(layer): norm for layer, norm in manifest.residual_norms.items()},
        ),
    )


def load_pack(path: str | os.PathLike[str]) -> SteeringPack:
    """Reads a pack and verifies every claim of its manifest.

    A pack that is replaced meanwhile is read as the old or the new one, never as a mixture.

    Args:
        path: Directory of the pack.

    Raises:
        PackError: A file is missing, malformed or altered, or the tensors do not match the manifest; the
            message names the file and the fault.
    """
    root = Path(path)
    if not root.is_dir():
        raise PackError(
            f"no steering pack at {str(path)!r}: that is not a directory; give the directory that "
            f"holds {MANIFEST_FILE}"
        )
    content, stamp = read_manifest(root, MAX_MANIFEST_BYTES)
    for _ in range(_ATTEMPTS):
        try:
            return _load(root, content)
        except PackError:
            before = stamp
            content, stamp = read_manifest(root, MAX_MANIFEST_BYTES)
            if stamp == before:
                raise
    raise PackError(
        f"{root}: replaced repeatedly while being read; load it when it no longer changes"
    )


def _load(root: Path, content: bytes) -> SteeringPack:
    """Returns the pack with this manifest content."""
    try:
        manifest = parse_manifest(content)
    except ValueError as error:
        raise PackError(f"{root / MANIFEST_FILE}: {error}") from error
    try:
        vectors = _read_vectors(root, staged_name(manifest.tensors.sha256), manifest)
    except FileNotFoundError:
        try:
            vectors = _read_vectors(root, VECTORS_FILE, manifest)
        except FileNotFoundError as error:
            raise PackError(
                f"{root / VECTORS_FILE}: cannot be read ({error.strerror}); a steering pack holds "
                f"{MANIFEST_FILE} and {VECTORS_FILE}"
            ) from error
    return SteeringPack(root, manifest, vectors)


def _read_vectors(root: Path, name: str, manifest: Manifest) -> dict[str, NDArray[np.float32]]:
    """Returns the tensors of a file, checked against the manifest."""
    file, claimed = root / name, manifest.tensors
    with opened(root, name) as (stream, size):
        if size != claimed.size:
            raise PackError(
                f"{file}: {'truncated' if size < claimed.size else 'larger than the manifest says'}: "
                f"it has {size} bytes, the manifest says {claimed.size}; copy the pack again"
            )
        try:
            vectors, digest = read_tensors(stream, size, _shapes(manifest))
        except ValueError as error:
            raise PackError(f"{file}: {error}") from error
    if digest != claimed.sha256:
        raise PackError(
            f"{file}: sha256 differs from the manifest's, so the file is damaged or not the one that "
            f"was extracted; copy the pack again or extract it again"
        )
    _check_values(file, vectors)
    return vectors


def _shapes(manifest: Manifest) -> dict[str, tuple[int, int]]:
    width = manifest.model.hidden_size
    return {direction.name: (len(direction.layers), width) for direction in manifest.directions}


def _check_values(file: Path, vectors: Mapping[str, NDArray[np.float32]]) -> None:
    """Raises PackError if a value is NaN or Inf, a row is zero, or its length does not fit float32."""
    for name, vector in vectors.items():
        # Both propagate NaN without a temporary array of the vectors' size.
        low, high = vector.min(axis=1), vector.max(axis=1)
        if not (np.isfinite(low) & np.isfinite(high)).all():
            raise PackError(
                f"{file}: direction {name!r} contains NaN or Inf; every value must be finite"
            )
        if not ((low != 0) | (high != 0)).all():
            raise PackError(
                f"{file}: direction {name!r} is zero at a layer, where it has no effect; "
                f"leave that layer out"
            )
        for length in np.sqrt(np.einsum("ij,ij->i", vector, vector, dtype=np.float64)):
            if not MIN_LENGTH <= length <= MAX_LENGTH:
                raise PackError(
                    f"{file}: direction {name!r} has a vector of length {length:.3g}; it must be between "
                    f"{MIN_LENGTH:g} and {MAX_LENGTH:g}, so that its square fits float32"
                )
