"""The content of a vector file of any format: arrays by their path of names."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from vllm_steer.errors import ConversionError

MAX_DEPTH: Final = 6
Names = tuple[str, ...]
Floats = NDArray[np.floating[Any]]


@dataclass(frozen=True, eq=False)
class Contents:
    """The arrays of a file.

    Attributes:
        format: ``gguf``, ``pt``, ``safetensors``, ``npy`` or ``json``.
        arrays: Names to array of any shape, float16, float32 or float64; names are the keys of nested
            dicts, or the single name of a tensor; empty if the file is one array.
        layers: Names of a dict to its value of ``layer``.
        row_layers: Layers of the rows of every matrix, if the file gives them.
        model_hint: Model type that the file names, if any.
    """

    format: str
    arrays: Mapping[Names, Floats]
    layers: Mapping[Names, int]
    row_layers: tuple[int, ...] | None = None
    model_hint: str | None = None


def flatten(file: Path, form: str, content: Any, array: Callable[[Any], Floats | None]) -> Contents:
    """Returns the arrays of nested dicts; other numbers and texts are skipped.

    Args:
        file: The file, for messages.
        form: Its format.
        content: Its content.
        array: Converts a value to an array; None if it is not one.

    Raises:
        ConversionError: A key is neither a text nor a number, two keys are the same layer, or dicts are
            nested too deeply.
    """
    arrays: dict[Names, Floats] = {}
    layers: dict[Names, int] = {}
    hints = []
    for names, value in _leaves(file, content, ()):
        found = array(value)
        if found is not None and found.ndim:
            if names in arrays:
                raise ConversionError(f"{file}: has the key {names[-1]!r} twice")
            arrays[names] = found
        elif names and names[-1] == "layer":
            layers[names[:-1]] = _layer(file, value if found is None else found.item())
        elif names and names[-1] == "model_type" and isinstance(value, str):
            hints.append(value)
    return Contents(form, arrays, layers, model_hint=hints[0] if len(hints) == 1 else None)


def _leaves(file: Path, value: Any, names: Names) -> Iterator[tuple[Names, Any]]:
    if not isinstance(value, Mapping):
        yield names, value
        return
    if len(names) == MAX_DEPTH:
        raise ConversionError(f"{file}: dicts are nested more than {MAX_DEPTH} deep")
    for key, inner in value.items():
        if type(key) not in (int, str):
            raise ConversionError(
                f"{file}: has a key {str(key)[:80]!r} of type {type(key).__name__}; keys must be names or layers, such as "
                f'12 or "layer_12"'
            )
        yield from _leaves(file, inner, (*names, str(key)))


def _layer(file: Path, value: Any) -> int:
    whole = (isinstance(value, str) and value.isdecimal()) or (
        isinstance(value, float) and value.is_integer()
    )
    number = int(value) if whole else value
    if type(number) is not int or number < 0:
        raise ConversionError(
            f"{file}: gives layer {str(value)[:80]!r}; a layer is a number from 0"
        )
    return number
