"""Control vectors become packs and back, as llama.cpp and repeng have them; hostile files are refused."""

from __future__ import annotations

import importlib
import struct
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader

from tests.offline.convert_cases import HIDDEN, MODEL, moods_pack, rows, write_control_vector
from vllm_steer.errors import ConversionError
from vllm_steer.offline.convert.packs import export_direction, read_direction
from vllm_steer.offline.models.loading import find_blocks
from vllm_steer.packs.pack import SteeringPack

ROOT = Path(__file__).parents[2]


@pytest.fixture
def pack(tmp_path: Path) -> SteeringPack:
    return moods_pack(tmp_path)


@pytest.fixture(scope="session")
def repeng(pytestconfig: pytest.Config) -> Iterator[Any]:
    """repeng, in pytest's cache: its release of 2024 asks for numpy 1, of which it uses a name alone."""
    (package,) = tomllib.loads((ROOT / "pyproject.toml").read_text())["dependency-groups"]["repeng"]
    assert pytestconfig.cache is not None
    folder = pytestconfig.cache.mkdir("repeng")
    if not (folder / "repeng").is_dir():
        install = ["install", "--quiet", "--no-deps", "--target", str(folder), package]
        subprocess.run([sys.executable, "-m", "pip", *install], check=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        patch.setattr(np, "float_", np.float64, raising=False)
        yield importlib.import_module("repeng")


def test_export_is_what_llama_cpp_reads(pack: SteeringPack, tmp_path: Path) -> None:
    """The conditions of its loader: F32, one dimension, one width, numbers from 1, nothing else."""
    export_direction(pack, "happy", tmp_path / "happy.gguf")
    reader = GGUFReader(tmp_path / "happy.gguf")
    assert reader.get_field("general.architecture").contents() == "controlvector"
    assert reader.get_field("controlvector.model_hint").contents() == "llama"
    assert reader.get_field("controlvector.layer_count").contents() == 2
    assert [tensor.name for tensor in reader.tensors] == ["direction.1", "direction.3"]
    for tensor, row in zip(reader.tensors, pack.vectors["happy"], strict=True):
        assert tensor.data.dtype == np.float32
        assert np.array_equal(tensor.data, row)


def test_repeng_reads_the_export(pack: SteeringPack, tmp_path: Path, repeng: Any) -> None:
    export_direction(pack, "happy", tmp_path / "happy.gguf")
    vector = repeng.ControlVector.import_gguf(tmp_path / "happy.gguf")
    assert vector.model_type == "llama"
    assert list(vector.directions) == [1, 3]
    for layer, row in zip((1, 3), pack.vectors["happy"], strict=True):
        assert np.array_equal(vector.directions[layer], row)


def test_repeng_export_is_read(tmp_path: Path, repeng: Any) -> None:
    given = rows()
    repeng.ControlVector("llama", given).export_gguf(tmp_path / "v.gguf")
    found = read_direction(str(tmp_path / "v.gguf"), "happy", None, MODEL)
    assert found.model_hint == "llama"
    assert all(np.array_equal(found.vectors[layer], row) for layer, row in given.items())
    assert list(found.vectors) == list(given)


def test_layer_k_of_repeng_is_the_output_of_block_k(tiny_llama: Any, repeng: Any) -> None:
    """Its control of layer k adds to what our hooks see as block k's output."""
    package = repeng
    tokens, width = torch.tensor([[5, 6, 7]]), tiny_llama.config.hidden_size
    vector = torch.randn(width, generator=torch.Generator().manual_seed(0))
    block = find_blocks(tiny_llama, 3)[1]
    handle = block.register_forward_hook(lambda module, args, output: output + 0.5 * vector)
    with torch.no_grad():
        expected = tiny_llama(tokens).logits
        handle.remove()
        plain = tiny_llama(tokens).logits
        control = package.ControlModel(tiny_llama, [1])
        try:
            control.set_control(package.ControlVector("llama", {1: vector.numpy()}), 0.5)
            found = control(tokens).logits
        finally:
            control.unwrap()
    assert torch.equal(found, expected)
    assert not torch.allclose(found, plain)


def test_layer_0_is_imported_but_not_exported(pack: SteeringPack, tmp_path: Path) -> None:
    write_control_vector(tmp_path / "v.gguf", rows(layers=(0, 2)))
    assert list(read_direction(str(tmp_path / "v.gguf"), "happy", None, MODEL).vectors) == [0, 2]
    with pytest.raises(ConversionError, match="llama.cpp refuses .* leave it out with --layers 2"):
        export_direction(pack, "low", tmp_path / "low.gguf")
    assert not (tmp_path / "low.gguf").exists()
    export_direction(pack, "low", tmp_path / "low.gguf", layers=[2])
    assert [tensor.name for tensor in GGUFReader(tmp_path / "low.gguf").tensors] == ["direction.2"]


def gguf_bytes(
    fields: bytes, field_count: int = 1, tensors: bytes = b"", tensor_count: int = 0
) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensor_count, field_count) + fields + tensors


def key(name: bytes, kind: int) -> bytes:
    return struct.pack("<Q", len(name)) + name + struct.pack("<I", kind)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"GGUF", "truncated"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "neither 2 nor 3 in little endian"),
        (gguf_bytes(b"", 2**60), "claims 0 tensors and 1152921504606846976 fields"),
        (gguf_bytes(b"", 0, b"", 2**60), "claims 1152921504606846976 tensors"),
        (gguf_bytes(struct.pack("<Q", 2**60)), "a string claims"),
        (gguf_bytes(key(b"a", 9) + struct.pack("<IQ", 4, 2**60)), "an array claims"),
        (gguf_bytes(key(b"a", 9) + struct.pack("<IQ", 9, 1)), "an array claims"),
        (gguf_bytes(key(b"a", 77)), "unknown type 77"),
        (gguf_bytes(key(b"a", 4) + b"12"), "truncated"),
        (gguf_bytes(b"", 0, struct.pack("<Q11sIQIQ", 11, b"direction.1", 1, 2**20, 0, 0), 1),
         "a tensor is larger than the file"),
        (gguf_bytes(b"", 0, struct.pack("<Q11sI", 11, b"direction.1", 4), 1), "4 dimensions"),
        (gguf_bytes(b"", 0, struct.pack("<Q11sIQIQ", 11, b"direction.1", 1, 16, 0, 0), 1),
         "not a readable GGUF file"),
        (gguf_bytes(b"", 0), "general.architecture is None"),
    ],
)  # fmt: skip
def test_hostile_gguf(data: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "v.gguf").write_bytes(data)
    with pytest.raises(ConversionError, match=message):
        read_direction(str(tmp_path / "v.gguf"), "happy", None, MODEL)


def test_damaged_gguf_never_crashes(tmp_path: Path) -> None:
    """Every cut and many flipped bytes: read, or refused with a reason."""
    write_control_vector(tmp_path / "v.gguf", rows())
    data = (tmp_path / "v.gguf").read_bytes()
    generator = np.random.default_rng(0)
    damaged = [data[:length] for length in range(len(data))]
    for _ in range(500):
        flipped = bytearray(data)
        flipped[generator.integers(300)] = generator.integers(256)
        damaged.append(bytes(flipped))
    refused = 0
    for candidate in damaged:
        (tmp_path / "d.gguf").write_bytes(candidate)
        try:
            read_direction(str(tmp_path / "d.gguf"), "happy", None, MODEL)
        except ConversionError:
            refused += 1
    assert refused >= len(data)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update({1: np.full(HIDDEN, np.inf, np.float32)}), "layer 1 has NaN or Inf"),
        (lambda d: d.update({1: np.ones(HIDDEN, np.int32)}), "direction.1 is I32; it must be F32"),
        (lambda d: d.update({1: np.ones(HIDDEN + 1, np.float32)}), r"vectors have \[17\] values"),
        (lambda d: d.update({8: np.ones(HIDDEN, np.float32)}), r"has layers \[8\]"),
        (lambda d: d.update({"01": np.ones(HIDDEN, np.float32)}), "a tensor 'direction.01'"),
        (lambda d: d.update({"../x": np.ones(HIDDEN, np.float32)}), "a tensor 'direction.../x'"),
    ],
)
def test_wrong_control_vectors(change: Callable[[Any], None], message: str, tmp_path: Path) -> None:
    directions: dict[Any, np.ndarray] = {**rows()}
    change(directions)
    write_control_vector(tmp_path / "v.gguf", directions)
    with pytest.raises(ConversionError, match=message):
        read_direction(str(tmp_path / "v.gguf"), "happy", None, MODEL)
