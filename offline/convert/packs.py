"""Vector files of other tools to steering packs, and a pack's direction to a control vector.

A pack records its model and the norm of the residual stream at every layer, which limits doses. Other formats
have neither, so both are taken from the model: its configuration, and one run of a few plain statements. If
only the configuration is available, the norms are given by a file or a pack for the same model.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError

from vllm_steer.errors import ConversionError, ExtractionError, choices
from vllm_steer.offline.convert.gguf_file import write_gguf
from vllm_steer.offline.convert.interpret import by_layer
from vllm_steer.offline.convert.readers import read_contents
from vllm_steer.offline.convert.vectors import VectorFile, checked, file_digest
from vllm_steer.offline.extract.capture import capture
from vllm_steer.offline.extract.records import explain
from vllm_steer.offline.models.chat import ChatFormat
from vllm_steer.offline.models.loading import (
    load_config,
    load_model,
    model_identity,
    read_config,
    read_tokenizer,
)
from vllm_steer.offline.models.prompts import render_prompt
from vllm_steer.offline.questions.statements import statements
from vllm_steer.packs.pack import (
    DirectionRecord,
    MethodRecord,
    ModelIdentity,
    PackContent,
    PackName,
    SteeringPack,
    load_pack,
    write_pack,
)

NORM_STATEMENTS: Final = 32
_MAX_NORMS_BYTES: Final = 2**20


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


@dataclass(frozen=True)
class NormSource:
    """Source of the median norms of a model's residual stream.

    Attributes:
        given: A JSON file of layer to norm, or a pack for the same model; None to measure them.
        chat: Format of the prompts for measuring them and for calibrating the pack.
    """

    given: str | os.PathLike[str] | None = None
    chat: ChatFormat = field(default_factory=ChatFormat)


_MEASURED = NormSource()


def import_pack(
    sources: Iterable[VectorSource],
    target: ImportTarget,
    model_path: str | os.PathLike[str],
    *,
    layers: Sequence[int] | None = None,
    norms: NormSource = _MEASURED,
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
    model = _identity(model_path, chat)
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
    found = (
        _measure_norms(model_path, chat)
        if norms.given is None
        else _given_norms(norms.given, model)
    )
    return write_pack(
        target.path,
        PackContent(
            name=name,
            model=model,
            directions=records,
            vectors={key: np.stack([*rows.values()]) for key, rows in vectors.items()},
            method=_method(files, norms.given is None, chat),
            residual_norms=found,
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


def _identity(model_path: str | os.PathLike[str], chat: ChatFormat) -> ModelIdentity:
    try:
        config = read_config(model_path)
    except ExtractionError as error:
        raise ConversionError(f"--model: {error}") from error
    try:
        tokenizer = read_tokenizer(model_path, config)
    except ExtractionError:
        return model_identity(model_path, config, None)
    try:
        chat.apply_to(tokenizer)
    except ExtractionError as error:
        raise ConversionError(str(error)) from error
    return model_identity(model_path, config, tokenizer)


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


def _measure_norms(model_path: str | os.PathLike[str], chat: ChatFormat) -> dict[int, float]:
    """Returns the norm of each block's output over plain statements, measured as extraction does."""
    try:
        _, tokenizer = load_config(model_path, chat)
        model = load_model(model_path, "float32", None)
        prompts = [
            render_prompt(tokenizer, statement.text)
            for statement in statements("extract")[:NORM_STATEMENTS]
        ]
        measured = capture(model, prompts, candidates=1, batch_size=8).residual_norms
    except ExtractionError as error:
        raise ConversionError(
            f"residual norms cannot be measured with the model: {' '.join(str(error).split())}; give them with "
            f"--residual-norms, as a JSON file of layer to norm or as a pack for the same model"
        ) from error
    return dict(enumerate(measured.tolist()))


def _given_norms(source: str | os.PathLike[str], model: ModelIdentity) -> dict[int, float]:
    path = Path(source)
    if path.is_dir():
        pack = load_pack(path)
        other = pack.manifest.model
        if (other.hidden_size, other.num_layers) != (model.hidden_size, model.num_layers):
            raise ConversionError(
                f"--residual-norms: steering pack {pack.name!r} is of a model with hidden size "
                f"{other.hidden_size} and {other.num_layers} layers; this one has {model.hidden_size} and "
                f"{model.num_layers}"
            )
        return {int(layer): norm for layer, norm in pack.manifest.residual_norms.items()}
    try:
        if path.stat().st_size > _MAX_NORMS_BYTES:
            raise ConversionError(f"--residual-norms: {path} is too large")
        return TypeAdapter(dict[int, float]).validate_json(path.read_bytes())
    except OSError as error:
        raise ConversionError(f"--residual-norms: {path}: {error.strerror}") from error
    except ValidationError as error:
        raise ConversionError(
            f"--residual-norms: {path}: {error.errors()[0]['msg']}; it must be a JSON object of layer to "
            f'norm, such as {{"0": 11.5, "1": 12.25}}'
        ) from error


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
