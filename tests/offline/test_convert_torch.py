"""What torch.save wrote is read as plain tensors; anything else is refused, never run."""

from __future__ import annotations

import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.offline.convert_cases import HIDDEN, MODEL, rows
from vllm_steer.errors import ConversionError
from vllm_steer.offline.convert.packs import read_direction


def as_torch(directions: dict[Any, np.ndarray]) -> dict[Any, torch.Tensor]:
    return {layer: torch.from_numpy(row) for layer, row in directions.items()}


@pytest.mark.parametrize(
    ("content", "layers", "expected"),
    [
        (as_torch(rows()), None, rows()),
        ({str(layer): row for layer, row in as_torch(rows()).items()}, None, rows()),
        ({"model_type": "llama", "directions": as_torch(rows())}, None, rows()),
        (torch.stack([*as_torch(rows(0, (0, 1, 2, 3))).values()]), None, rows(0, (0, 1, 2, 3))),
        (torch.stack([*as_torch(rows()).values()]), [1, 2, 3], rows()),
        (torch.from_numpy(rows()[1]), [2, 3], {2: rows()[1], 3: rows()[1]}),
        ({f"layer_{layer}": row for layer, row in as_torch(rows()).items()}, None, rows()),
        ({f"model.layers.{layer}": row[None] for layer, row in as_torch(rows()).items()}, None, rows()),
        ({"layer": 2, "vector": torch.from_numpy(rows()[2])}, None, {2: rows()[2]}),
        (torch.from_numpy(rows()[1])[None], [3], {3: rows()[1]}),
        # Hidden states with the embeddings in front, and the last after the final norm.
        (torch.stack([torch.ones(HIDDEN), *as_torch(rows(0, (0, 1, 2, 3))).values()]), None,
         {k: row for k, row in rows(0, (0, 1, 2, 3)).items() if k < 3}),
        ({1: torch.ones(HIDDEN, dtype=torch.bfloat16), 2: torch.zeros(HIDDEN)}, None,
         {1: np.ones(HIDDEN, np.float32)}),
        ({1: torch.ones(HIDDEN, dtype=torch.float64) / 3}, None,
         {1: np.full(HIDDEN, np.float32(1 / 3))}),
    ],
)  # fmt: skip
def test_plain_tensors(
    content: Any, layers: list[int] | None, expected: dict[int, np.ndarray], tmp_path: Path
) -> None:
    torch.save(content, tmp_path / "v.pt")
    found = read_direction(str(tmp_path / "v.pt"), "happy", layers, MODEL).vectors
    assert list(found) == list(expected)
    for layer, row in expected.items():
        assert found[layer].dtype == np.float32
        assert np.array_equal(found[layer], row)


@pytest.mark.parametrize(
    ("name", "layers", "expected"),
    [
        ("vec_layer_2.pt", None, [2]),
        ("vec_layer_2.pt", [2], [2]),
        ("blk.3-happy.pt", None, [3]),
        ("happy.pt", [1, 2], [1, 2]),
        # No layer: a number in the name of a concept, or of a size.
        ("player2.pt", [1], [1]),
        ("llama-3-8b.pt", [1], [1]),
    ],
)
@pytest.mark.parametrize("shape", [(HIDDEN,), (1, HIDDEN)])
def test_one_vector_belongs_where_its_name_says(
    name: str, layers: list[int] | None, expected: list[int], shape: tuple[int, ...], tmp_path: Path
) -> None:
    torch.save(torch.ones(shape), tmp_path / name)
    assert list(read_direction(str(tmp_path / name), "happy", layers, MODEL).vectors) == expected


@pytest.mark.parametrize("layers", [[1], [1, 2], [2, 3]])
def test_a_layer_that_contradicts_the_name_is_refused(layers: list[int], tmp_path: Path) -> None:
    """As when two files are given that hold one layer each, with the layer of the first."""
    torch.save(torch.ones(HIDDEN), tmp_path / "vec_layer_2.pt")
    with pytest.raises(
        ConversionError,
        match="by the name of its file for layer 2, and --layers says .*For one direction of several",
    ):
        read_direction(str(tmp_path / "vec_layer_2.pt"), "happy", layers, MODEL)


class Runs:
    """Makes a directory when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.path,)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "holds a list of int; it must be tensors"),
        ({}, "holds no array; it must hold a vector"),
        ({"a": torch.ones(HIDDEN)}, "one vector for no layer in particular"),
        ({-1: torch.ones(HIDDEN)}, "key '-1' where a layer belongs"),
        ({True: torch.ones(HIDDEN)}, "key 'True' of type bool; keys must be names or layers"),
        ({1: torch.ones(HIDDEN), "1": torch.ones(HIDDEN)}, "has the key '1' twice"),
        ({9: torch.ones(HIDDEN)}, r"has layers \[9\]; the model has layers 0 to 3"),
        ({1: torch.ones(7)}, r"vectors have \[7\] values; the model's hidden size is 16"),
        ({1: torch.ones(2, HIDDEN)}, r"layer 1 has an array \[2, 16\]; it must be one vector"),
        ({1: torch.ones(HIDDEN, dtype=torch.int32)}, "holds torch.int32"),
        ({1: [1.0] * HIDDEN}, "holds a list of float; it must be tensors"),
        ({1: torch.full((HIDDEN,), float("nan"))}, "layer 1 has NaN or Inf"),
        ({1: torch.full((HIDDEN,), 1e300, dtype=torch.float64)}, "layer 1 has NaN or Inf"),
        ({1: torch.zeros(HIDDEN)}, "every vector is zero"),
        ({1: torch.ones(1).expand(HIDDEN)}, "larger than its stored data"),
        (torch.ones(1).expand(4, HIDDEN), "larger than its stored data"),
        (torch.ones(3, HIDDEN), "has 3 rows, and the model has 4 blocks; name the layer"),
        (torch.ones(HIDDEN), "name its layer with --layers, such as --layers 2"),
        ({1: np.ones(HIDDEN, np.float32)}, "holds more than tensors.*save plain tensors"),
    ],
)  # fmt: skip
def test_other_content_is_refused(content: Any, message: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "v.pt")
    with pytest.raises(ConversionError, match=message):
        read_direction(str(tmp_path / "v.pt"), "happy", None, MODEL)


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    torch.save({1: torch.ones(HIDDEN), 2: Runs(trap)}, tmp_path / "zip.pt")
    torch.save(Runs(trap), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "bare.pt").write_bytes(pickle.dumps(Runs(trap)))
    for name, message in (
        ("zip.pt", "code is never unpickled"),
        ("old.pt", "is a Python pickle, .* never opened"),
        ("bare.pt", "is a Python pickle, .* never opened"),
    ):
        with pytest.raises(ConversionError, match=message):
            read_direction(str(tmp_path / name), "happy", None, MODEL)
    assert not trap.exists()
    torch.load(tmp_path / "zip.pt", weights_only=False)
    assert trap.exists(), "the trap does not work"


def test_archive_bombs_are_refused(tmp_path: Path) -> None:
    torch.save({1: torch.ones(HIDDEN)}, tmp_path / "v.pt")
    with (
        zipfile.ZipFile(tmp_path / "v.pt") as plain,
        zipfile.ZipFile(tmp_path / "c.pt", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for member in plain.namelist():
            bomb.writestr(member, plain.read(member))
        bomb.writestr("v/data/9", bytes(10**8))
    with pytest.raises(ConversionError, match="its archive is compressed"):
        read_direction(str(tmp_path / "c.pt"), "happy", None, MODEL)
    torch.save({1: torch.ones(HIDDEN), 2: list(range(10**6))}, tmp_path / "many.pt")
    with pytest.raises(ConversionError, match="more objects than a vector file needs"):
        read_direction(str(tmp_path / "many.pt"), "happy", None, MODEL)
    data = (tmp_path / "v.pt").read_bytes()
    for length in range(0, len(data), 97):
        (tmp_path / "cut.pt").write_bytes(data[:length])
        with pytest.raises(ConversionError):
            read_direction(str(tmp_path / "cut.pt"), "happy", None, MODEL)
