"""Vectors that a trusted client uploads for a limited time: ``PUT /v1/steering/vectors/NAME``.

Disabled unless ``--steering-upload-mib`` sets the largest body. A body is a safetensors file; it becomes a
pack in a private directory of the server, checked and loaded like any other.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from pydantic import TypeAdapter, ValidationError

from vllm_steer.errors import PackError, RequestError
from vllm_steer.fields import LayerIndex
from vllm_steer.packs.manifest import DirectionRecord, MethodRecord
from vllm_steer.packs.pack import PackContent, SteeringPack, write_pack
from vllm_steer.packs.registry import UPLOADED
from vllm_steer.packs.strict_json import parse_json
from vllm_steer.packs.tensor_file import MAX_HEADER_BYTES, MAX_HEADER_VALUES, read_tensors

DEFAULT_SECONDS: Final = 600.0
MAX_SECONDS: Final = 86_400.0
_WANTED: Final = (
    'send a safetensors file with a float32 tensor [layers, hidden_size] for each direction and the metadata {"layers": '
    '"[0, 1, ...]"}'
)


def write_upload(
    root: Path, name: str, body: bytes, registry_packs: Iterable[SteeringPack]
) -> SteeringPack:
    """Writes a body as a pack.

    Args:
        root: Directory for it.
        name: Name of the pack.
        body: A safetensors file: for each direction a float32 tensor ``[layers, hidden_size]``, and
            ``layers`` in its metadata, the layers as JSON.
        registry_packs: Served packs, whose model and residual norms the new one takes.

    Raises:
        RequestError: The body is not such a file, or its vectors cannot be served.
    """
    packs = list(registry_packs)
    if not packs:
        raise RequestError(
            "body: uploads take their model and residual norms from a loaded pack; load one first"
        )
    model = packs[0].manifest.model
    names, layers = _header(body)
    norms = _norms(layers, packs)
    try:
        shapes = {direction: (len(layers), model.hidden_size) for direction in names}
        vectors, digest = read_tensors(io.BytesIO(body), len(body), shapes)
        return write_pack(
            root,
            PackContent(
                name=name,
                model=model,
                directions=[_record(direction, layers) for direction in names],
                vectors=vectors,
                method=MethodRecord(
                    name=UPLOADED, settings={}, libraries={}, seed=0, data_sha256=digest
                ),
                residual_norms=norms,
            ),
        )
    except (ValueError, PackError) as error:
        # The client must not learn the server's path.
        message = re.sub(rf"{re.escape(str(root))}/?", "", str(error))
        raise RequestError(f"body: {message}; {_WANTED}") from error


def expiry(query: bytes) -> float:
    """Returns how many seconds vectors are kept: ``seconds`` of the query string.

    Raises:
        RequestError: It is not a number from 1 to :data:`MAX_SECONDS`, or there is another parameter.
    """
    if not query:
        return DEFAULT_SECONDS
    found = re.fullmatch(rb"seconds=(\d{1,6}(?:\.\d{1,3})?)", query)
    seconds = float(found[1]) if found else 0.0
    if not 1.0 <= seconds <= MAX_SECONDS:
        raise RequestError(f"seconds: must be a number from 1 to {MAX_SECONDS:g}, as ?seconds=600")
    return seconds


def _header(body: bytes) -> tuple[list[str], list[int]]:
    """Names of the tensors and layers; all other claims of the file are checked later."""
    length = int.from_bytes(body[:8], "little")
    if not 0 < length <= min(MAX_HEADER_BYTES, len(body) - 8):
        raise RequestError(f"body: not a safetensors file; {_WANTED}")
    try:
        header: Any = parse_json(body[8 : 8 + length], MAX_HEADER_VALUES)
        metadata = header.pop("__metadata__")
        layers = TypeAdapter(list[LayerIndex]).validate_json(metadata["layers"], strict=True)
    except (ValueError, ValidationError, KeyError, TypeError, AttributeError) as error:
        raise RequestError(f"body: {type(error).__name__} in its header; {_WANTED}") from error
    return list(header), layers


def _norms(layers: Iterable[int], packs: Iterable[SteeringPack]) -> Mapping[int, float]:
    known: dict[int, float] = {}
    for pack in packs:
        for layer, norm in pack.manifest.residual_norms.items():
            known.setdefault(int(layer), norm)
    unknown = [layer for layer in layers if layer not in known]
    if unknown:
        raise RequestError(
            f"body: no loaded pack has measured the residual stream after layers {unknown}; known are {sorted(known)}"
        )
    return {layer: known[layer] for layer in layers}


def _record(name: str, layers: list[int]) -> DirectionRecord:
    return DirectionRecord(name=name, layers=layers, default_scale=1.0, positions="all")
