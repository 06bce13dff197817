"""A pack is read back as written, or refused with its reason."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

from tests.unit.conftest import HIDDEN
from vllm_steer.errors import PackError
from vllm_steer.packs.manifest import VECTORS_FILE
from vllm_steer.packs.pack import MANIFEST_FILE, SteeringPack, load_pack
from vllm_steer.packs.summary import pack_summary


def test_round_trip(fears: SteeringPack) -> None:
    again = load_pack(fears.path)
    assert again.manifest == fears.manifest
    assert again.digests == fears.digests
    for name, vector in fears.vectors.items():
        assert vector.dtype == np.float32
        assert np.array_equal(again.vectors[name], vector)


def test_digest_is_the_content(pack_at: Callable[..., SteeringPack]) -> None:
    one, two = pack_at("one", {"a": [1, 2]}), pack_at("two", {"b": [1, 2]})
    assert one.digests["a"] == two.digests["b"]
    assert pack_at("three", {"a": [1, 2]}, seed=1).digests["a"] != one.digests["a"]
    assert pack_at("four", {"a": [1, 3]}).digests["a"] != one.digests["a"]


def test_vectors_cannot_be_changed(fears: SteeringPack) -> None:
    with pytest.raises(ValueError, match="read-only"):
        fears.vectors["spiders"][0, 0] = 1.0


def _edit(pack: SteeringPack, change: Callable[[dict[str, Any]], object]) -> None:
    file = pack.path / MANIFEST_FILE
    manifest = json.loads(file.read_text())
    change(manifest)
    file.write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(schema_version=2), "schema_version:"),
        (lambda m: m.update(colour="red"), "colour:"),
        (lambda m: m.pop("model"), "model:"),
        (lambda m: m.update(name="../fears"), "name:"),
        (lambda m: m["tensors"].update(file="../other"), "tensors.file:"),
        (lambda m: m["directions"][0].update(default_scale="8"), "default_scale:"),
        (lambda m: m["directions"][0].update(safe_scale=0), "safe_scale:"),
        (lambda m: m["directions"][0].update(positions="some"), "positions:"),
        (lambda m: m["directions"][0].update(layers=[2, 1, 3]), "must be ascending and distinct"),
        (
            lambda m: m["directions"][0].update(layers=[1, 2, 4]),
            "has layer 4; the model has layers 0",
        ),
        (lambda m: m["directions"][0].update(name="a/b"), "name:"),
        (lambda m: m["directions"][1].update(name="spiders"), "given twice: .'spiders'."),
        (lambda m: m["residual_norms"].pop("2"), "residual_norms lacks layers .2."),
        (lambda m: m["residual_norms"].update({"2": -1.0}), "residual_norms.2:"),
    ],
)
def test_malformed_manifest(change: Any, message: str, fears: SteeringPack) -> None:
    _edit(fears, change)
    with pytest.raises(PackError, match=message):
        load_pack(fears.path)


def test_manifest_is_not_json(fears: SteeringPack) -> None:
    (fears.path / MANIFEST_FILE).write_text("{")
    with pytest.raises(PackError, match="Invalid JSON"):
        load_pack(fears.path)


def test_manifest_with_nan(fears: SteeringPack) -> None:
    file = fears.path / MANIFEST_FILE
    file.write_text(file.read_text().replace('"default_scale": 2.0', '"default_scale": NaN'))
    with pytest.raises(PackError, match=r"default_scale|Invalid JSON"):
        load_pack(fears.path)


def test_altered_tensor_file(fears: SteeringPack) -> None:
    file = fears.path / VECTORS_FILE
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(PackError, match="sha256 differs"):
        load_pack(fears.path)


def test_longer_tensor_file(fears: SteeringPack) -> None:
    with (fears.path / VECTORS_FILE).open("ab") as stream:
        stream.write(b"more")
    with pytest.raises(PackError, match="larger than the"):
        load_pack(fears.path)


def _replace_vectors(pack: SteeringPack, vectors: dict[str, np.ndarray]) -> None:
    data = save(vectors)
    (pack.path / VECTORS_FILE).write_bytes(data)
    _edit(
        pack, lambda m: m["tensors"].update(sha256=hashlib.sha256(data).hexdigest(), size=len(data))
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.pop("spiders"), "missing .'spiders'."),
        (
            lambda v: v.update(extra=np.ones((1, HIDDEN), np.float32)),
            "not in the manifest .'extra'.",
        ),
        (
            lambda v: v.update(spiders=np.ones((2, HIDDEN), np.float32)),
            r"float32 of shape \(3, 16\)",
        ),
        (lambda v: v.update(spiders=np.ones((3, HIDDEN), np.float16)), "is float16"),
        (lambda v: v.update(spiders=np.full((3, HIDDEN), np.nan, np.float32)), "NaN or Inf"),
        (lambda v: v.update(spiders=np.full((3, HIDDEN), np.inf, np.float32)), "NaN or Inf"),
        (lambda v: v.update(spiders=np.zeros((3, HIDDEN), np.float32)), "zero at a layer"),
        (
            lambda v: v.update(spiders=np.full((3, HIDDEN), 1e-45, np.float32)),
            r"a vector of length .*e-4\d; it must be between 1e-18 and 1e\+18",
        ),
        (
            lambda v: v.update(spiders=np.eye(3, HIDDEN, dtype=np.float32) * np.float32(3e38)),
            r"a vector of length 3e\+38; it must be between",
        ),
    ],
)
def test_wrong_tensors(change: Any, message: str, fears: SteeringPack) -> None:
    vectors = dict(fears.vectors)
    change(vectors)
    _replace_vectors(fears, vectors)
    with pytest.raises(PackError, match=message):
        load_pack(fears.path)


def test_not_safetensors(fears: SteeringPack) -> None:
    data = b"\xff" * 64
    (fears.path / VECTORS_FILE).write_bytes(data)
    _edit(
        fears,
        lambda m: m["tensors"].update(sha256=hashlib.sha256(data).hexdigest(), size=len(data)),
    )
    with pytest.raises(PackError, match="not a readable safetensors file"):
        load_pack(fears.path)


def test_missing_files(tmp_path: Path, fears: SteeringPack) -> None:
    with pytest.raises(PackError, match="not a directory"):
        load_pack(tmp_path / "nowhere")
    (fears.path / VECTORS_FILE).unlink()
    with pytest.raises(PackError, match="cannot be read"):
        load_pack(fears.path)


def test_positions_may_be_those_of_any_request(fears: SteeringPack, tmp_path: Path) -> None:
    manifest = json.loads((fears.path / MANIFEST_FILE).read_text())
    ends = {"prompt": [[0, 2], [-2, None]]}
    for positions in (ends, [[1, None]], {"generated": [0, 4]}, "prompt"):
        manifest["directions"][0]["positions"] = positions
        shutil.copytree(fears.path, tmp_path, dirs_exist_ok=True)
        (tmp_path / MANIFEST_FILE).write_text(json.dumps(manifest))
        pack = load_pack(tmp_path)
        assert pack.manifest.model_dump()["directions"][0]["positions"] == positions
        assert (positions if isinstance(positions, str) else json.dumps(positions)) in pack_summary(
            pack
        )
