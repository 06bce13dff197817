"""LoReFT files of pyreft and of PEFT's manner of naming, to steering packs.

pyreft writes a folder: one ``intkey_layer_10_comp_block_output_unit_pos_nunit_1#0.bin`` of ``torch.save`` for each
intervention, with ``weight``, ``bias`` and ``rotate_layer``. Other trainers write one safetensors file whose names say the
layer: ``base_model.model.model.layers.10.learned_source.weight``, ``…learned_source.bias``, ``…rotate_layer.weight``.
Whatever the file, W is ``[rank, hidden_size]``, b ``[rank]`` and the rotation ``[hidden_size, rank]`` with orthonormal
columns. Nothing is unpickled but plain tensors.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError

from vllm_steer.errors import ConversionError
from vllm_steer.offline.convert.contents import Names
from vllm_steer.offline.convert.model import MEASURED, NormSource, model_of, norms_of
from vllm_steer.offline.convert.packs import VectorSource
from vllm_steer.offline.convert.readers import read_contents
from vllm_steer.offline.convert.vectors import file_digest
from vllm_steer.offline.extract.records import explain
from vllm_steer.offline.train.directions import Target, low_rank_directions
from vllm_steer.packs.pack import (
    MethodRecord,
    ModelIdentity,
    PackContent,
    PackName,
    SteeringPack,
    write_pack,
)
from vllm_steer.request.positions import AnyPositions, plain_positions

Floats = NDArray[np.float32]
# As pyvene names what it saves: by layer and component, or by the module's own name with a blank for each dot.
_KEY: Final = re.compile(
    r"intkey_(?:layer_(?P<layer>\d+)_comp_(?P<component>.+)|comp_(?P<module>.+))_unit_pos_nunit_\d+#(?P<number>\d+)"
)
_MODULE: Final = re.compile(r"(?:.*_)?layers\[(?P<layer>\d+)\]_output")
_LAYER: Final = re.compile(r"(?:^|\.)(?:layers?|h|blocks?)\.(?P<layer>\d+)(?=\.|$)")
_PART: Final = re.compile(r"(?:^|\.)(?:self_attn|attention|attn|mlp|\w+_proj)(?:\.|$)")
NOTE: Final = "the files do not say whether W·h + b went through an activation function; as in LoReFT, none is taken"
_PARTS: Final = ("weight", "bias", "rotation")
# How far the columns of a rotation may be from orthonormal, as bfloat16 leaves them.
_SLACK: Final = 0.05


@dataclass(frozen=True, eq=False)
class LowRankFile:
    """A LoReFT form as another tool stored it.

    Attributes:
        layers: Blocks whose outputs it changes, ascending.
        projection: R, float32 ``[layers, rank, hidden_size]``.
        weight: W, likewise.
        bias: b, float32 ``[layers, rank]``.
        files: Format and sha256 of each file.
    """

    layers: tuple[int, ...]
    projection: Floats
    weight: Floats
    bias: Floats
    files: tuple[Mapping[str, str], ...]


def import_reft(
    sources: Iterable[VectorSource],
    target: Target,
    model_path: str | os.PathLike[str],
    positions: AnyPositions,
    norms: NormSource = MEASURED,
) -> SteeringPack:
    """Writes a pack of LoReFT forms.

    Args:
        sources: Name of each form, and its folder or file; ``FOLDER#1`` takes the second intervention of every layer.
        target: The pack that is written.
        model_path: Checkpoint directory or Hugging Face id of the model that the forms are for.
        positions: Where they act, which the files do not say.
        norms: Where the model's residual norms are taken from.

    Returns:
        The pack, read back from disk.

    Raises:
        ConversionError: A file is not what it should be, or does not fit the model.
        PackError: The pack cannot be written.
    """
    model = model_of(model_path, norms.chat)
    forms = {name: read_low_rank(os.fspath(source), model) for name, source in sources}
    directions = [
        direction
        for name, form in forms.items()
        for direction in low_rank_directions(
            name, form.layers, form.projection, form.weight, form.bias
        )
    ]
    try:
        TypeAdapter(PackName).validate_python(target.name)
        records = [direction.record(positions) for direction in directions]
    except ValidationError as error:
        raise ConversionError(
            f"pack {target.name!r} cannot be written: {explain(error)}"
        ) from error
    digest = "".join(file["sha256"] for form in forms.values() for file in form.files)
    return write_pack(
        target.path,
        PackContent(
            name=target.name,
            model=model,
            directions=records,
            vectors={direction.name: direction.vectors for direction in directions},
            method=MethodRecord(
                name="imported",
                settings={
                    "files": {
                        name: [{**file} for file in form.files] for name, form in forms.items()
                    },
                    "form": "loreft",
                    "positions": plain_positions(positions),
                    "residual_norms": "measured" if norms.given is None else "given",
                    **norms.chat.model_dump(),
                },
                libraries={library: version(library) for library in ("torch", "transformers")},
                seed=0,
                data_sha256=hashlib.sha256(digest.encode()).hexdigest(),
            ),
            residual_norms=norms_of(model_path, norms, model),
        ),
    )


def read_low_rank(source: str, model: ModelIdentity) -> LowRankFile:
    """Reads a LoReFT form.

    Args:
        source: A folder of pyreft, a file, or either with ``#NUMBER`` for one of several interventions at the same layers.
        model: The model.

    Raises:
        ConversionError: It is not a LoReFT form, or not one of the model's.
    """
    path, number = _located(source)
    parts: dict[int, dict[str, NDArray[np.floating]]] = {}
    files = []
    for file in _files(path, number):
        digest, contents = file_digest(file), read_contents(file)
        files.append({"format": contents.format, "sha256": digest})
        said = _layer_of_file(file)
        for names, array in contents.arrays.items():
            layer, part = _meaning(file, names, said)
            if part in parts.setdefault(layer, {}):
                raise ConversionError(
                    f"{path}: has {part} of layer {layer} twice; leave one out, or say which intervention is meant, as "
                    f"{path}#0"
                )
            parts[layer][part] = array
    return LowRankFile(*_stacked(path, parts, model), tuple(files))


def _located(source: str) -> tuple[Path, int | None]:
    path, hash_sign, number = source.rpartition("#")
    if hash_sign and number.isdecimal() and not Path(source).exists():
        return Path(path), int(number)
    return Path(source), None


def _files(path: Path, number: int | None) -> list[Path]:
    """Returns the files of a form: those of a folder, or one alone."""
    if not path.is_dir():
        return [path]
    files = sorted(path.glob("intkey_*.bin")) or sorted(path.glob("*.safetensors"))
    numbers = {int(found["number"]) for file in files if (found := _KEY.fullmatch(file.stem))}
    if number is None and len(numbers) > 1:
        raise ConversionError(
            f"{path}: has {len(numbers)} interventions at the same layers, such as those of first and of last tokens that "
            f"share nothing; import each with its own positions: NAME={path}#{min(numbers)}"
        )
    if number is not None:
        files = [f for f in files if (x := _KEY.fullmatch(f.stem)) and int(x["number"]) == number]
    if not files:
        raise ConversionError(
            f"{path}: holds no intkey_*.bin of pyreft{'' if number is None else f' with #{number}'} and no safetensors "
            f"file; give the folder that save_directory named"
        )
    return files


def _layer_of_file(file: Path) -> int | None:
    """Returns the layer that pyreft's name of a file says; None of any other name."""
    found = _KEY.fullmatch(file.stem)
    if found is None:
        return None
    module = _MODULE.fullmatch(found["module"]) if found["module"] else None
    if module:
        return int(module["layer"])
    if found["component"] == "block_output":
        return int(found["layer"])
    raise ConversionError(
        f"{file}: intervenes at {found['component'] or found['module']!r}, and steering acts on what a block returns; train "
        f"it with the component block_output"
    )


def _meaning(file: Path, names: Names, said: int | None) -> tuple[int, str]:
    """Returns the layer and the part that an array is, by its name."""
    name = ".".join(names)
    layers = [int(found["layer"]) for found in _LAYER.finditer(name)]
    if _PART.search(name):
        raise ConversionError(
            f"{file}: {name[:80]!r} is of a part of a block, and steering acts on what a block returns"
        )
    if said is not None:
        layers.append(said)
    if len(layers) != 1:
        raise ConversionError(
            f"{file}: {name[:80]!r} says {len(layers)} layers; it must say one, as layers.10 in it or in the name of a file "
            f"of pyreft"
        )
    if re.search(r"(?:^|\.)rotate_layer(?:\.weight)?$", name):
        return layers[0], "rotation"
    if found := re.search(r"(?:^|\.)(?P<part>weight|bias)$", name):
        inside = name[: found.start()].rpartition(".")[2]
        if inside in ("", "learned_source"):
            return layers[0], found["part"]
    raise ConversionError(
        f"{file}: holds {name[:80]!r}, and a LoReFT form has weight and bias of learned_source, and rotate_layer as a plain "
        f"matrix (of another intervention of pyreft, such as DiReFT, or of a parametrisation, save rotate_layer.weight)"
    )


def _stacked(
    path: Path, parts: Mapping[int, Mapping[str, NDArray[np.floating]]], model: ModelIdentity
) -> tuple[tuple[int, ...], Floats, Floats, Floats]:
    """Returns layers, R, W and b, checked."""
    layers = tuple(sorted(parts))
    if not layers or layers[-1] >= model.num_layers:
        raise ConversionError(
            f"{path}: has layers {list(layers)}; the model has layers 0 to {model.num_layers - 1}"
        )
    rank = next((len(parts[layers[0]][k]) for k in ("bias", "weight") if k in parts[layers[0]]), 0)
    shapes = {
        "weight": (rank, model.hidden_size),
        "bias": (rank,),
        "rotation": (model.hidden_size, rank),
    }
    found: dict[str, list[Floats]] = {part: [] for part in _PARTS}
    for layer in layers:
        for part, shape in shapes.items():
            array = parts[layer].get(part)
            if array is None or array.shape != shape:
                held = "lacks it" if array is None else f"has {list(array.shape)}"
                raise ConversionError(
                    f"{path}: layer {layer} must have {part} {list(shape)}, and {held}; the model's hidden size is "
                    f"{model.hidden_size}, and every layer has the same rank"
                )
            with np.errstate(over="ignore"):
                found[part].append(array.astype(np.float32))
    _check_values(path, layers, found)
    rotation = np.stack(found["rotation"]).transpose(0, 2, 1)
    return (
        layers,
        np.ascontiguousarray(rotation),
        np.stack(found["weight"]),
        np.stack(found["bias"]),
    )


def _check_values(path: Path, layers: Sequence[int], found: Mapping[str, Sequence[Floats]]) -> None:
    for part, arrays in found.items():
        for layer, array in zip(layers, arrays, strict=True):
            if not np.isfinite(array).all():
                raise ConversionError(
                    f"{path}: {part} of layer {layer} has NaN or Inf; every value must be finite"
                )
            if part == "rotation":
                exact = array.astype(np.float64)
                away = float(np.abs(exact.T @ exact - np.eye(array.shape[1])).max())
                if away > _SLACK:
                    raise ConversionError(
                        f"{path}: the columns of rotate_layer of layer {layer} are {away:.2g} from orthonormal, so this is "
                        f"no LoReFT form; save rotate_layer.weight, and not what it is parametrised by"
                    )
