"""Vectors of other tools become packs and back; what is not plain tensors is refused, never run."""

from __future__ import annotations

import json
import os
import pickle
import re
import struct
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader, GGUFWriter

from offline.convert.gguf_file import read_gguf
from offline.convert.packs import export_direction, import_pack
from offline.convert.torch_file import read_torch
from offline.demo import demo_model_path
from offline.models import find_blocks
from tests.random_pack import random_identity, write_random_pack
from vllm_steer.cli import main
from vllm_steer.errors import ConversionError
from vllm_steer.pack import SteeringPack, load_pack

HIDDEN = 16
MODEL = random_identity(HIDDEN, 4)


@pytest.fixture
def pack(tmp_path: Path) -> SteeringPack:
    return write_random_pack(
        tmp_path / "moods", "moods", MODEL, {"happy": [1, 3], "low": [0, 2]},
        seed=0, default_scale=2.0, safe_scale=4.0, residual_norm=10.0,
    )  # fmt: skip


@pytest.fixture
def config_dir(tmp_path: Path) -> Path:
    """A model directory without weights and tokenizer."""
    folder = tmp_path / "model"
    folder.mkdir()
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN,
        "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 8, "vocab_size": 32,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def rows(seed: int = 0, layers: tuple[int, ...] = (1, 2, 3)) -> dict[int, np.ndarray]:
    generator = np.random.default_rng(seed)
    return {layer: generator.standard_normal(HIDDEN).astype(np.float32) for layer in layers}


def write_control_vector(
    file: Path, directions: dict[int, np.ndarray], hint: str = "llama"
) -> None:
    """The calls that repeng's and EasySteer's exports make."""
    writer = GGUFWriter(file, "controlvector")
    writer.add_string("controlvector.model_hint", hint)
    writer.add_uint32("controlvector.layer_count", len(directions))
    for layer, direction in directions.items():
        writer.add_tensor(f"direction.{layer}", direction)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def repeng() -> Any:
    """repeng, whose release of 2024 names a type that numpy 2 dropped."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(np, "float_", np.float64, raising=False)
        return pytest.importorskip("repeng")


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


def test_repeng_reads_the_export(pack: SteeringPack, tmp_path: Path) -> None:
    export_direction(pack, "happy", tmp_path / "happy.gguf")
    vector = repeng().ControlVector.import_gguf(tmp_path / "happy.gguf")
    assert vector.model_type == "llama"
    assert list(vector.directions) == [1, 3]
    for layer, row in zip((1, 3), pack.vectors["happy"], strict=True):
        assert np.array_equal(vector.directions[layer], row)


def test_repeng_export_is_read(tmp_path: Path) -> None:
    given = rows()
    repeng().ControlVector("llama", given).export_gguf(tmp_path / "v.gguf")
    found = read_gguf(tmp_path / "v.gguf", MODEL)
    assert found.model_hint == "llama"
    assert all(np.array_equal(found.vectors[layer], row) for layer, row in given.items())
    assert list(found.vectors) == list(given)


def test_layer_k_of_repeng_is_the_output_of_block_k(tiny_llama: Any) -> None:
    """Its control of layer k adds to what our hooks see as block k's output."""
    package = repeng()
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


def test_round_trip(pack: SteeringPack, config_dir: Path, tmp_path: Path) -> None:
    export_direction(pack, "happy", tmp_path / "happy.gguf")
    again = import_pack(
        {"happy": tmp_path / "happy.gguf"}, name="again", model_path=config_dir,
        out_dir=tmp_path / "again", scale=3.0, safe_scale=5.0, residual_norms=pack.path,
    )  # fmt: skip
    assert again.digests["happy"] == pack.digests["happy"]
    record = again.directions["happy"]
    assert (record.layers, record.default_scale, record.safe_scale) == ([1, 3], 3.0, 5.0)
    assert again.manifest.method.name == "imported"
    assert again.manifest.method.settings["residual_norms"] == "given"
    assert again.manifest.residual_norms == pack.manifest.residual_norms
    assert again.manifest.model.hidden_size == HIDDEN


def test_layer_0_is_imported_but_not_exported(pack: SteeringPack, tmp_path: Path) -> None:
    write_control_vector(tmp_path / "v.gguf", rows(layers=(0, 2)))
    assert list(read_gguf(tmp_path / "v.gguf", MODEL).vectors) == [0, 2]
    with pytest.raises(ConversionError, match="llama.cpp refuses .* leave it out with --layers 2"):
        export_direction(pack, "low", tmp_path / "low.gguf")
    assert not (tmp_path / "low.gguf").exists()
    export_direction(pack, "low", tmp_path / "low.gguf", layers=[2])
    assert [tensor.name for tensor in GGUFReader(tmp_path / "low.gguf").tensors] == ["direction.2"]


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
    found = read_torch(tmp_path / "v.pt", layers, MODEL).vectors
    assert list(found) == list(expected)
    for layer, row in expected.items():
        assert found[layer].dtype == np.float32
        assert np.array_equal(found[layer], row)


class Runs:
    """Makes a directory when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.path,)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "holds a list; it must be a tensor"),
        ({}, "holds a dict; it must be a tensor"),
        ({"a": torch.ones(HIDDEN)}, "key 'a' where a layer belongs"),
        ({-1: torch.ones(HIDDEN)}, "key '-1' where a layer belongs"),
        ({True: torch.ones(HIDDEN)}, "key 'True' where a layer belongs"),
        ({1: torch.ones(HIDDEN), "1": torch.ones(HIDDEN)}, "gives a layer twice"),
        ({9: torch.ones(HIDDEN)}, r"has layers \[9\]; the model has layers 0 to 3"),
        ({1: torch.ones(7)}, r"vectors have \[7\] values; the model's hidden size is 16"),
        ({1: torch.ones(2, HIDDEN)}, r"holds torch.float32 \[2, 16\]"),
        ({1: torch.ones(HIDDEN, dtype=torch.int32)}, "holds torch.int32"),
        ({1: [1.0] * HIDDEN}, "holds list; vectors must be float tensors"),
        ({1: torch.full((HIDDEN,), float("nan"))}, "layer 1 has NaN or Inf"),
        ({1: torch.full((HIDDEN,), 1e300, dtype=torch.float64)}, "layer 1 has NaN or Inf"),
        ({1: torch.zeros(HIDDEN)}, "every vector is zero"),
        ({1: torch.ones(1).expand(HIDDEN)}, "larger than what is stored of it"),
        (torch.ones(1).expand(4, HIDDEN), "larger than what is stored of it"),
        (torch.ones(3, HIDDEN), "has 3 rows for 4 blocks of the model; name the layer"),
        (torch.ones(HIDDEN), "one vector for no layer in particular; name its layers"),
        ({1: np.ones(HIDDEN, np.float32)}, "holds more than tensors.*save plain tensors"),
    ],
)  # fmt: skip
def test_other_content_is_refused(content: Any, message: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "v.pt")
    with pytest.raises(ConversionError, match=message):
        read_torch(tmp_path / "v.pt", None, MODEL)


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    torch.save({1: torch.ones(HIDDEN), 2: Runs(trap)}, tmp_path / "zip.pt")
    torch.save(Runs(trap), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "bare.pt").write_bytes(pickle.dumps(Runs(trap)))
    for name, message in (
        ("zip.pt", "code is never unpickled"),
        ("old.pt", "neither a GGUF file nor what torch.save writes"),
        ("bare.pt", "neither a GGUF file nor what torch.save writes"),
    ):
        with pytest.raises(ConversionError, match=message):
            read_torch(tmp_path / name, None, MODEL)
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
        read_torch(tmp_path / "c.pt", None, MODEL)
    torch.save({1: torch.ones(HIDDEN), 2: list(range(10**6))}, tmp_path / "many.pt")
    with pytest.raises(ConversionError, match="more objects than a vector file has"):
        read_torch(tmp_path / "many.pt", None, MODEL)
    data = (tmp_path / "v.pt").read_bytes()
    for length in range(0, len(data), 97):
        (tmp_path / "cut.pt").write_bytes(data[:length])
        with pytest.raises(ConversionError):
            read_torch(tmp_path / "cut.pt", None, MODEL)


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
    start = time.monotonic()
    with pytest.raises(ConversionError, match=message):
        read_gguf(tmp_path / "v.gguf", MODEL)
    assert time.monotonic() - start < 2


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
            read_gguf(tmp_path / "d.gguf", MODEL)
        except ConversionError:
            refused += 1
    assert refused >= len(data)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update({1: np.full(HIDDEN, np.inf, np.float32)}), "layer 1 has NaN or Inf"),
        (lambda d: d.update({1: np.ones(HIDDEN, np.int32)}), "direction.1 is int32"),
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
        read_gguf(tmp_path / "v.gguf", MODEL)


def test_norms_are_measured_with_the_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the command line, with the shipped model: its norms come out as its own extraction has them."""
    width = json.loads((demo_model_path() / "config.json").read_text())["hidden_size"]
    torch.save({3: torch.ones(width)}, tmp_path / "v.pt")
    status = main(
        ["convert", "import", f"one={tmp_path / 'v.pt'}", "--model", str(demo_model_path()),
         "--name", "moods", "--out", str(tmp_path / "p"), "--scale", "0.5"]
    )  # fmt: skip
    assert status == 0, capsys.readouterr().err
    manifest = load_pack(tmp_path / "p").manifest
    assert manifest.method.settings["residual_norms"] == "measured"
    norms = manifest.residual_norms
    assert [int(layer) for layer in norms] == list(range(manifest.model.num_layers))
    assert manifest.model.chat_template_sha256 is not None
    assert all(1 < norm < 1000 for norm in norms.values())
    assert (
        main(["convert", "export", str(tmp_path / "p"), "one", "--out", str(tmp_path / "o.gguf")])
        == 0
    )
    assert f"--control-vector-scaled {tmp_path / 'o.gguf'}:0.5" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "residual norms cannot be measured .*give them with --residual-norms"),
        (["--residual-norms", "nowhere.json"], "--residual-norms: nowhere.json: No such file"),
        (["--residual-norms", "norms.json", "--layers", "7"], r"no vector at layers \[7\]"),
        (["--residual-norms", "bad.json"], "it must be a JSON object of layer to norm"),
        (["--residual-norms", "norms.json"], "residual_norms lacks layers .3."),
        (["--residual-norms", "norms.json", "--name", "../x"], "name: String should match"),
        (["--residual-norms", "norms.json", "--layers", "1", "--scale", "nan"], "nan"),
    ],
)  # fmt: skip
def test_faults_on_the_command_line(
    arguments: list[str], message: str, config_dir: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    write_control_vector(tmp_path / "v.gguf", rows())
    (tmp_path / "norms.json").write_text('{"1": 10.0, "2": 11.0}')
    (tmp_path / "bad.json").write_text('{"one": 10.0}')
    base = [
        "convert",
        "import",
        "a=v.gguf",
        "--model",
        str(config_dir),
        "--name",
        "n",
        "--out",
        "out",
    ]
    assert main([*base, *arguments]) == 1
    shown = capsys.readouterr().err
    assert shown.startswith("vllm-steer: ")
    assert re.search(message, shown), shown
    assert not (tmp_path / "out").exists()
    assert main([*base, "--residual-norms", "norms.json", "--layers", "1", "2"]) == 0
