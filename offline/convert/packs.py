"""Vector files of other tools to steering packs, and a pack's direction to a control vector.

A pack records its model and the norm of the residual stream at every layer, which limits doses. Other formats
have neither, so both are taken from the model: its configuration, and one run of a few plain statements. If
only the configuration is available, the norms are given by a file or a pack for the same model.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError

from vllm_steer.errors import ConversionError, choices
from vllm_steer.offline.convert.gguf_file import write_gguf
from vllm_steer.offline.convert.interpret import by_layer
from vllm_steer.offline.convert.model import MEASURED, NormSource, model_of, norms_of
from vllm_steer.offline.convert.readers import read_contents
from vllm_steer.offline.convert.vectors import VectorFile, checked, file_digest
from vllm_steer.offline.extract.records import explain
from vllm_steer.offline.models.chat import ChatFormat
from vllm_steer.packs.pack import (
    DirectionRecord,
    MethodRecord,
    ModelIdentity,
    PackContent,
    PackName,
    SteeringPack,
    write_pack,
)


class VectorSource(NamedTuple):
    """A file of a direction, or one of several with its layers.

    Attributes:
        name: Name of the direction.
        file: GGUF, PyTorch, safetensors, ``.npy`` or JSON, recognised by content; see
            ``vllm_steer.offline.convert.interpret``. ``FILE#KEY`` for the direction under that name in the file.
    """

    name: str
    file: str | os.PathLike[str]


@dataclass(frozen=True)
class ImportTarget:
    """The pack to write.

    Attributes:
        name: Its name.
        path: Its directory.
        scale: Default scale (ε) of its directions: the strength of llama.cpp, the coefficient of repeng.
        safe_scale: Largest |scale| known to give fluent text.
    """

    name: str
    path: str | os.PathLike[str]
    scale: float
    safe_scale: float


def import_pack(
    sources: Iterable[VectorSource],
    target: ImportTarget,
    model_path: str | os.PathLike[str],
    *,
    layers: Sequence[int] | None = None,
    norms: NormSource = MEASURED,
    notice: Callable[[str], None] = lambda _: None,
) -> SteeringPack:
    """Writes a pack of directions from vector files.

    Args:
        sources: The files of each direction.
        target: The pack to write.
        model_path: Checkpoint directory or Hugging Face id of the vectors' model.
        layers: Keep only these layers; for files that name no layers, the layers of their rows.
        norms: Source of the model's residual norms.
        notice: Called with a line about how a file was interpreted.

    Returns:
        The pack, read back from disk.

    Raises:
        ConversionError: A file is invalid, or does not fit the model.
        PackError: The pack cannot be written.
    """
    name, chat = target.name, norms.chat
    model = model_of(model_path, chat)
    files: dict[str, list[VectorFile]] = {}
    for key, source in sources:
        files.setdefault(key, []).append(read_direction(str(source), key, layers, model, notice))
    vectors = {key: _joined(key, read) for key, read in files.items()}
    try:
        TypeAdapter(PackName).validate_python(name)
        records = [
            DirectionRecord(
                name=key,
                layers=list(vectors[key]),
                default_scale=target.scale,
                safe_scale=target.safe_scale,
                positions="all",
                metrics={"model_hint": hint} if (hint := read[0].model_hint) else {},
            )
            for key, read in files.items()
        ]
    except ValidationError as error:
        raise ConversionError(f"pack {name!r} cannot be written: {explain(error)}") from error
    return write_pack(
        target.path,
        PackContent(
            name=name,
            model=model,
            directions=records,
            vectors={key: np.stack([*rows.values()]) for key, rows in vectors.items()},
            method=_method(files, norms.given is None, chat),
            residual_norms=norms_of(model_path, norms, model),
        ),
    )


def export_direction(
    pack: SteeringPack,
    direction: str,
    out: str | os.PathLike[str],
    layers: Sequence[int] | None = None,
) -> None:
    """Writes a direction as a GGUF control vector, unscaled.

    Args:
        pack: The pack.
        direction: Name of the direction.
        out: The file to write.
        layers: Write only these layers; None for all.

    Raises:
        ConversionError: There is no such direction or layer, the layers include layer 0, or the file cannot
            be written.
    """
    if direction not in pack.directions:
        raise ConversionError(
            f"steering pack {pack.name!r} has no direction {direction!r}; "
            f"{choices(direction, pack.directions)}"
        )
    held = dict(zip(pack.directions[direction].layers, pack.vectors[direction], strict=True))
    if missing := sorted(set(layers or ()) - held.keys()):
        raise ConversionError(
            f"direction {direction!r} has no layers {missing}; it has {sorted(held)}"
        )
    write_gguf(
        Path(out),
        {layer: row for layer, row in held.items() if layers is None or layer in layers},
        model_type=pack.manifest.model.model_type,
        name=f"{pack.name}/{direction}",
    )


def read_direction(
    source: str,
    name: str,
    layers: Sequence[int] | None,
    model: ModelIdentity,
    notice: Callable[[str], None] = lambda _: None,
) -> VectorFile:
    """Reads one direction of a vector file.

    Args:
        source: The file, or ``FILE#KEY`` for the direction under that name in it.
        name: Name of the direction.
        layers: As in :func:`import_pack`.
        model: The model.
        notice: As in :func:`import_pack`.

    Raises:
        ConversionError: It cannot be read, or does not fit the model.
    """
    file, key = Path(source), None
    if "#" in source and not file.exists():
        path, _, key = source.rpartition("#")
        file = Path(path)
    digest = file_digest(file)
    contents = read_contents(file)
    rows, notes = by_layer(file, key, name, contents, layers, model)
    for note in notes:
        notice(note)
    return VectorFile(contents.format, digest, checked(file, rows), contents.model_hint)


def _joined(name: str, files: Sequence[VectorFile]) -> dict[int, NDArray[np.float32]]:
    """Returns the vectors of a direction, float32 ``[hidden_size]`` by layer, ascending."""
    rows: dict[int, NDArray[np.float32]] = {}
    for file in files:
        if again := sorted(rows.keys() & file.vectors.keys()):
            raise ConversionError(
                f"{name}: two of its files hold layers {again}; files of one direction must hold different layers, given "
                f"in their names or inside: leave one out, or give it another name"
            )
        rows |= file.vectors
    return dict(sorted(rows.items()))


def _method(
    files: Mapping[str, Sequence[VectorFile]], measured: bool, chat: ChatFormat
) -> MethodRecord:
    every = [file.sha256 for read in files.values() for file in read]
    digest = hashlib.sha256("".join(every).encode())
    return MethodRecord(
        name="imported",
        settings={
            "files": {
                key: [{"format": file.format, "sha256": file.sha256} for file in read]
                for key, read in files.items()
            },
            "residual_norms": "measured" if measured else "given",
            **chat.model_dump(),
        },
        libraries={library: version(library) for library in ("torch", "transformers")},
        seed=0,
        data_sha256=digest.hexdigest(),
    )
