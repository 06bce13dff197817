"""Names and shapes of a file's arrays to one direction: a vector for each layer.

Layer k is the output of decoder block k, 0-based. A name gives a layer as a number (``12``) or as a module's
name (``layer_12``, ``model.layers.12``); the rest of it names a direction, since a file may hold several.
Arrays without a layer in their name are

- a matrix ``[layers, hidden_size]``: row i is for the i-th of the layers given; with as many rows as the
  model has blocks, for layer i; with one more, the rows are hidden states with the embeddings in front, as
  persona vectors are: row i + 1 for layer i, and the last is left out, since Hugging Face gives it after the
  final norm;
- one vector ``[hidden_size]``: for the layer in the name of file, folder or direction, as with contrastive
  activation addition (``vec_layer_13.pt``), or for each of the layers given.

Axes of length 1 are ignored. Ambiguous input is refused.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np

from vllm_steer.errors import ConversionError
from vllm_steer.offline.convert.contents import Contents, Floats, Names
from vllm_steer.offline.convert.vectors import MAX_LAYERS, check_fit
from vllm_steer.packs.pack import ModelIdentity

_NUMBER: Final = r"(?P<layer>0|[1-9][0-9]{0,3})"
_MODULES: Final = r"(?:layers?|blocks?|blk|h)"
# layer_12, model.layers.12, happy.layer_12.vector; 12, happy.12, but no qwen2.5 and no happy_2.
_AS_MODULE: Final = re.compile(
    rf"(?:(?P<before>.*)[^A-Za-z0-9])?{_MODULES}[._-]?{_NUMBER}(?:[./](?P<after>.*))?", re.I
)
_AS_NUMBER: Final = re.compile(rf"(?:(?P<before>.*[^0-9./])[./])?{_NUMBER}")
_BAD_NUMBER: Final = re.compile(r"[+-]?[0-9]+")
# vec_layer_13_llama, but no range such as layers_13-15.
_IN_NAME: Final = re.compile(
    rf"(?:^|[^a-z])(?:layers?|blocks?|blk)[ ._-]?{_NUMBER}(?![0-9]|-[0-9])", re.I
)
_WHOLE_NAME: Final = re.compile(rf"L{_NUMBER}", re.I)
_FOLDER: Final = re.compile(rf"(?:layers?|blocks?|blk)[ ._-]?{_NUMBER}", re.I)
# Words of a name that do not identify a direction.
_PLAIN: Final = frozenset(
    "vector vectors direction directions steering_vector steering_vectors control_vector layer_activations layer layers "
    "model transformer language_model base_model decoder gpt_neox output resid_post hook_resid_post data "
    "state_dict".split()
)
# Parts of a block, whose vectors do not apply to its output.
_PART: Final = re.compile(
    r"(?:^|[._/])(?:mlp|attn|self_attn|attention|\w+_proj|\w*norm|lora_\w+|ffn\w*|resid_pre|resid_mid|input|"
    r"hook_(?!resid_post)\w+)(?:[._/]|$)",
    re.I,
)


@dataclass(eq=False)
class _Group:
    """The arrays of one direction."""

    by_layer: dict[int, Floats] = field(default_factory=dict)
    bare: dict[str, Floats] = field(default_factory=dict)


def by_layer(
    file: Path,
    key: str | None,
    name: str,
    contents: Contents,
    layers: Sequence[int] | None,
    model: ModelIdentity,
) -> tuple[dict[int, Floats], list[str]]:
    """Returns the vectors of one direction, ``[hidden_size]`` by layer, and notes for the user.

    Args:
        file: The file, for messages and the layer in its name.
        key: Name of the direction in the file; None for its only one, or the one called ``name``.
        name: Name of the direction.
        contents: The file's arrays.
        layers: Keep these layers; for arrays without a layer, the layers of their rows.
        model: The model.

    Raises:
        ConversionError: It does not hold the direction, does not give the layers of its vectors, or they do
            not fit the model; the message says what to write.
    """
    group = _chosen(file, key, name, _groups(file, contents, key))
    notes: list[str] = []
    if group.by_layer:
        found = {layer: _vector(file, layer, array) for layer, array in group.by_layer.items()}
        beyond = model.num_layers
        if contents.format == "gguf" and beyond in found and len(found) > 1:
            del found[beyond]
            notes.append(
                f"{file}: direction.{beyond} is left out, as llama.cpp does: the model's last block is {beyond - 1}"
            )
        found = _kept(file, found, layers)
    else:
        ((inside, array),) = group.bare.items()
        said = {"file": file.stem, "direction": name, "tensor": inside}
        found = _placed(file, said, np.squeeze(array), contents.row_layers, layers, model, notes)
    check_fit(file, found, (len(row) for row in found.values()), model)
    return found, notes


def _groups(file: Path, contents: Contents, key: str | None) -> dict[str, _Group]:
    """Returns the directions of a file by their names in it."""
    groups: dict[str, _Group] = {}
    for names, array in contents.arrays.items():
        whole = ".".join(names)
        name, own = _split(file, names)
        said = {
            contents.layers[names[:i]] for i in range(len(names)) if names[:i] in contents.layers
        }
        said |= set() if own is None else {own}
        if len(said) > 1:
            raise ConversionError(
                f"{file}: gives two layers for {whole!r}, {sorted(said)}; leave one out"
            )
        layer = min(said, default=None)
        if (
            key is not None
            and key != name
            and whole != key
            and not whole.startswith((f"{key}.", f"{key}/"))
        ):
            continue
        group = groups.setdefault(name, _Group())
        if layer is None:
            group.bare[whole] = array
        elif layer in group.by_layer:
            this = shlex.quote(f"{name or 'NAME'}={file}#{whole}")
            raise ConversionError(
                f"{file}: gives layer {layer} twice, the second time as {whole!r}; say which is meant, such as {this}"
            )
        else:
            group.by_layer[layer] = array
    return groups


def _split(file: Path, names: Names) -> tuple[str, int | None]:
    """Returns the name of a direction, and the layer in it if there is one."""
    words, layers = [], []
    for part in names:
        found = _AS_NUMBER.fullmatch(part) or _AS_MODULE.fullmatch(part)
        if found:
            layers.append(int(found["layer"]))
            parts = found.groupdict()
            words += [text for text in (parts["before"], parts.get("after")) if text]
        elif _BAD_NUMBER.fullmatch(part):
            raise ConversionError(
                f"{file}: has a key {part[:80]!r} where a layer belongs, 0 to {MAX_LAYERS - 1}"
            )
        else:
            words.append(part)
    if len(layers) > 1:
        raise ConversionError(
            f"{file}: names two layers in {'.'.join(names)[:80]!r}; a name may hold one"
        )
    name = ".".join(
        word for text in words for word in re.split(r"[./]", text) if word.lower() not in _PLAIN
    )
    if layers and (found := _PART.search(name)):
        raise ConversionError(
            f"{file}: {'.'.join(names)[:80]!r} is of a part of block {layers[0]}, {found[0].strip('._/')!r}, and steering "
            f"adds to what a block returns; give vectors of the residual stream after the block"
        )
    return name, layers[0] if layers else None


def _chosen(file: Path, key: str | None, name: str, groups: Mapping[str, _Group]) -> _Group:
    """Returns the arrays of the chosen direction."""
    if not groups:
        raise ConversionError(
            f"{file}: holds no array{'' if key is None else f' under {key!r}'}; it must hold a vector [hidden_size], a "
            f"matrix [layers, hidden_size], or vectors by layer"
        )
    if len(groups) > 1 and name not in groups:
        shown = " ".join(shlex.quote(f"{known or name}={file}#{known}") for known in [*groups][:4])
        raise ConversionError(
            f"{file}: holds {len(groups)} directions, and none is named {name!r}; say which: {shown}"
        )
    group = groups[name] if name in groups else next(iter(groups.values()))
    if group.by_layer and group.bare or len(group.bare) > 1:
        raise ConversionError(
            f"{file}: {next(iter(group.bare))!r} names no layer, and there are others; say which is meant: "
            f"{shlex.quote(f'{name}={file}#{next(iter(group.bare))}')}"
        )
    return group


def _vector(file: Path, layer: int, array: Floats) -> Floats:
    vector = np.squeeze(array)
    if vector.ndim != 1:
        raise ConversionError(
            f"{file}: layer {layer} has an array {list(array.shape)}; it must be one vector [hidden_size]: save the mean or "
            f"the row that is meant"
        )
    return vector


def _placed(
    file: Path,
    names: Mapping[str, str],
    array: Floats,
    row_layers: Sequence[int] | None,
    layers: Sequence[int] | None,
    model: ModelIdentity,
    notes: list[str],
) -> dict[int, Floats]:
    """Returns the rows of an array without layers in its name by layer."""
    blocks = model.num_layers
    if array.ndim == 1:
        named = _named_layer(file, names, layers)
        if named is None and row_layers is None and blocks > 1:
            raise ConversionError(
                f"{file}: holds one vector for no layer in particular; name its layer with --layers, such as --layers "
                f"{blocks // 2}, or in the file's name, such as {file.stem}_layer_{blocks // 2}{file.suffix}"
            )
        return dict.fromkeys(named or row_layers or [0], array)
    if array.ndim != 2:
        raise ConversionError(
            f"{file}: holds an array {list(array.shape)}; save the one direction of it that is meant, as a matrix [layers, "
            f"hidden_size] or a vector [hidden_size]"
        )
    if row_layers is not None and len(row_layers) == len(array):
        return _kept(file, dict(zip(row_layers, array, strict=True)), layers)
    if layers is not None and len(layers) == len(array):
        if len({*layers}) < len(layers):
            raise ConversionError(f"--layers: {[*layers]} names a layer twice")
        return dict(zip(layers, array, strict=True))
    if len(array) == blocks + 1:
        notes.append(
            f"{file}: {blocks + 1} rows are read as hidden states, the embeddings first: row k + 1 is layer k, and the "
            f"last, which is after the final norm, is left out"
        )
        return _kept(file, dict(enumerate(array[1:-1])), layers)
    if len(array) == blocks:
        return _kept(file, dict(enumerate(array)), layers)
    raise ConversionError(
        f"{file}: has {len(array)} rows, and the model has {blocks} blocks; name the layer of each row, in their order, "
        f"with --layers and {len(array)} numbers from 0 to {blocks - 1}"
    )


def _kept(
    file: Path, found: Mapping[int, Floats], layers: Sequence[int] | None
) -> dict[int, Floats]:
    if layers is None:
        return dict(found)
    if missing := sorted({*layers} - found.keys()):
        raise ConversionError(
            f"{file}: has no vector at layers {missing}; it has {sorted(found)}: give some of these to --layers, or "
            f"leave it out"
        )
    return {layer: row for layer, row in found.items() if layer in layers}


def _named_layer(
    file: Path, names: Mapping[str, str], layers: Sequence[int] | None
) -> Sequence[int] | None:
    """The layers of one vector: those given, or the one in a name.

    Raises:
        ConversionError: Names differ from each other, or from what was given.
    """
    said = {
        what: int(found["layer"])
        for what, text in names.items()
        if (found := _IN_NAME.search(text) or _WHOLE_NAME.fullmatch(text))
    }
    if not said and (found := _FOLDER.fullmatch(file.absolute().parent.name)):
        said["folder"] = int(found["layer"])
    if not said:
        return layers
    if len({*said.values()}) > 1 or (layers is not None and {*layers} != {*said.values()}):
        told = f", and --layers says {[*layers]}" if layers is not None else ""
        raise ConversionError(
            f"{file}: holds one vector, "
            + ", ".join(
                f"by the name of its {what} for layer {layer}" for what, layer in said.items()
            )
            + f"{told}; leave --layers out and let one name say it. For one direction of several files, give its name to "
            f"each: happy=vec_layer_13.pt happy=vec_layer_14.pt"
        )
    return [*said.values()][:1]
