"""Names and shapes to layers: what is unambiguous is read, and what is not says what to write."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tests.offline.convert_cases import HIDDEN, MODEL, config_folder, rows, write_control_vector
from vllm_steer.cli import main
from vllm_steer.errors import ConversionError
from vllm_steer.offline.convert.packs import (
    ImportTarget,
    NormSource,
    VectorSource,
    import_pack,
    read_direction,
)
from vllm_steer.packs.pack import load_pack

ALL = rows(0, (0, 1, 2, 3))
OTHER = rows(1, (0, 1, 2, 3))


def tensor(layer: int, found: dict[int, np.ndarray] = ALL) -> torch.Tensor:
    return torch.from_numpy(found[layer])


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: a model's configuration, norms, and files of vectors beside them."""
    monkeypatch.chdir(tmp_path)
    config_folder(tmp_path / "model", 4)
    (tmp_path / "norms.json").write_text(json.dumps(dict.fromkeys(range(4), 10.0)))
    return tmp_path


def run(*arguments: str) -> int:
    return main(
        ["convert", "import", *arguments, "--model", "model", "--name", "p", "--out", "p",
         "--residual-norms", "norms.json"]
    )  # fmt: skip


def imported() -> dict[str, list[int]]:
    """Directions and layers of the pack, whose vectors are those of ``ALL``."""
    pack = load_pack("p")
    for name, record in pack.directions.items():
        for layer, vector in zip(record.layers, pack.vectors[name], strict=True):
            assert np.array_equal(vector, ALL[layer])
    return {name: record.layers for name, record in pack.directions.items()}


@pytest.mark.parametrize("ending", ["npy", "gguf", "json", "safetensors", "pt"])
def test_several_files_make_one_direction(ending: str, here: Path) -> None:
    for layer in (1, 2):
        file = here / f"calm_layer_{layer}.{ending}"
        if ending == "npy":
            np.save(file, ALL[layer])
        elif ending == "gguf":
            write_control_vector(file, {layer: ALL[layer]})
        elif ending == "json":
            file.write_text(json.dumps([float(number) for number in ALL[layer]]))
        elif ending == "safetensors":
            save_file({"vector": tensor(layer)}, file)
        else:
            torch.save(tensor(layer), file)
    assert run(f"calm=calm_layer_2.{ending}", f"calm=calm_layer_1.{ending}") == 0
    assert imported() == {"calm": [1, 2]}


@pytest.mark.parametrize(
    ("files", "arguments", "message"),
    [
        # Each with the layer of the other, or with that of both.
        (["a_layer_1.npy", "b_layer_2.npy"], ["--layers", "1"], "file for layer 2, and --layers says"),
        (["layer_1/v.npy", "layer_2/v.npy"], ["--layers", "1"], "folder for layer 2, and --layers says"),
        (["blk-1.npy", "blk-2.npy"], ["--layers", "1", "2"], "file for layer 1, and --layers says"),
        (["a.npy", "b.npy"], ["--layers", "1"], "two of its files hold layers"),
        (["a.npy", "b.npy"], [], "for no layer in particular"),
        (["a.gguf", "b.gguf"], [], "two of its files hold layers"),
    ],
)  # fmt: skip
def test_files_that_do_not_say_their_layers_make_none(
    files: list[str],
    arguments: list[str],
    message: str,
    here: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Also where each has a name of its own, the files of another layer are not put on this one."""
    for name in files:
        (here / name).parent.mkdir(exist_ok=True)
        if name.endswith("gguf"):
            write_control_vector(here / name, {2: ALL[2]})
        else:
            np.save(here / name, ALL[1])
    assert run(*(f"calm={name}" for name in files), *arguments) == 1
    assert re.search(message, capsys.readouterr().err)
    assert not (here / "p").exists()


@pytest.mark.parametrize(("first", "second"), [("layer_1", "layer_2"), ("l1", "L2")])
def test_a_direction_that_is_named_for_a_layer_has_that_one(
    first: str, second: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save(here / "a.npy", ALL[1])
    np.save(here / "b.npy", ALL[2])
    assert run(f"{first}=a.npy", f"{second}=b.npy", "--layers", "1") == 1
    assert "direction for layer 2, and --layers says [1]" in capsys.readouterr().err
    assert run(f"{first}=a.npy", f"{second}=b.npy") == 0
    assert imported() == {first: [1], second: [2]}


def test_rows_belong_to_the_layers_in_the_order_given(here: Path) -> None:
    """Sorted, each would have got the other's."""
    np.save(here / "m.npy", np.stack([ALL[3], ALL[1]]))
    assert run("calm=m.npy", "--layers", "3", "1") == 0
    assert imported() == {"calm": [1, 3]}
    with pytest.raises(ConversionError, match=r"\[1, 1\] names a layer twice"):
        read_direction("m.npy", "calm", [1, 1], MODEL)


STATES = np.stack([OTHER[0], *ALL.values()])


@pytest.mark.parametrize(
    ("content", "layers", "expected"),
    [
        ({"blocks.2.hook_resid_post": tensor(2)}, None, [2]),
        ({"transformer.h.2": tensor(2)}, None, [2]),
        ({"happy": {"layer": 2, "vector": tensor(2)}, "sad": {"layer": 1, "vector": tensor(1)}}, None, [2]),
        ({2: {"happy": tensor(2), "sad": tensor(1)}, 3: {"happy": tensor(3), "sad": tensor(1)}}, None, [2, 3]),
        ({"happy": torch.from_numpy(STATES), "sad": torch.from_numpy(STATES)}, None, [0, 1, 2]),
        ({"happy": tensor(2), "sad": tensor(1)}, [2], [2]),
        ({"layer": torch.tensor(2), "vector": tensor(2), "method": "caa", "score": 0.5}, None, [2]),
        ([tensor(layer) for layer in ALL], None, [0, 1, 2, 3]),
        (torch.from_numpy(STATES)[:, None], None, [0, 1, 2]),
        (torch.from_numpy(STATES), [1], [1]),
        ({"steering_vectors": {f"layer{k}": tensor(k) for k in (1, 2)}}, [2], [2]),
        # Of more layers than the model has, those that are asked for.
        ({k: tensor(k % 4) for k in range(6)}, [1, 2], [1, 2]),
    ],
)  # fmt: skip
def test_forms(content: Any, layers: list[int] | None, expected: list[int], tmp_path: Path) -> None:
    torch.save(content, tmp_path / "v.pt")
    found = read_direction(str(tmp_path / "v.pt"), "happy", layers, MODEL).vectors
    assert [*found] == expected
    assert all(np.array_equal(found[layer], ALL[layer]) for layer in expected)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"model.layers.2.mlp": tensor(2)}, "part of block 2, 'mlp'"),
        ({"blocks.2.hook_resid_pre": tensor(2)}, "part of block 2, 'hook_resid_pre'"),
        ({2: {"resid_pre": tensor(2)}}, "part of block 2, 'resid_pre'"),
        ({"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(8, HIDDEN)}, "part of block 0"),
        ({1: {2: tensor(2)}}, "names two layers"),
        ({"layer": 2, "vectors": {1: tensor(1)}}, "gives two layers for"),
        ({"layer": -1, "vector": tensor(1)}, "a layer is a number from 0"),
        ({"layer": True, "vector": tensor(1)}, "a layer is a number from 0"),
        ({"qwen2.5": tensor(1)}, "for no layer in particular"),
        ({"happy_2": tensor(1)}, "for no layer in particular"),
        ({k: tensor(k % 4) for k in range(5)}, r"has layers \[4\].* save each under the layer before it"),
        (torch.ones(2, 4, HIDDEN), r"array \[2, 4, 16\]; save the one direction"),
        (torch.ones(HIDDEN, 4), "has 16 rows"),
        ({"a": {"b": {"c": {"d": {"e": {"f": {"g": tensor(1)}}}}}}}, "more than 6 deep"),
        ({1: torch.ones(HIDDEN).to(torch.float8_e4m3fn)}, "times its scale"),
        ({1: tensor(1).to_sparse()}, "dense tensors of floats"),
    ],
)  # fmt: skip
def test_what_can_be_read_in_two_ways_is_refused(
    content: Any, message: str, tmp_path: Path
) -> None:
    torch.save(content, tmp_path / "v.pt")
    with pytest.raises(ConversionError, match=message):
        read_direction(str(tmp_path / "v.pt"), "calm", None, MODEL)


@pytest.mark.parametrize(
    "content",
    [
        torch.from_numpy(ALL[2]),
        {"happy": tensor(2), "sad": tensor(1)},
        {"happy": {2: tensor(2)}, "sad": {2: tensor(1)}},
        {"vector": {2: tensor(2)}, "output": {2: tensor(1)}},
        {"vector": tensor(2), "output": tensor(1)},
        {2: tensor(2), "mean": tensor(1)},
        np.stack([ALL[2], ALL[1]]),
        {k: tensor(k % 4) for k in range(5)},
    ],
)
def test_advice_leads_somewhere(
    content: Any, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whoever writes what each message says comes to an end in at most three steps, never to the same twice."""
    torch.save(torch.from_numpy(content) if isinstance(content, np.ndarray) else content, "v.pt")
    source, layers, seen = "calm=v.pt", [], set()
    for _ in range(4):
        if run(source, *layers) == 0:
            return
        message = capsys.readouterr().err
        assert message not in seen
        seen.add(message)
        if "such as --layers" in message:
            layers = ["--layers", "2"]
        elif "in their order, with --layers and 2 numbers" in message:
            layers = ["--layers", "2", "1"]
        elif "keep those of the model with --layers" in message:
            layers = ["--layers", "0", "1", "2"]
        else:
            (source,) = [
                item for item in shlex.split(message.rpartition(": ")[2].rpartition("such as ")[2] if "such as " in message
                else message.rpartition(": ")[2])[:1]
            ]  # fmt: skip
            source = "calm=" + source.partition("=")[2]
            assert "#" in source, message
    pytest.fail(f"no end: {seen}")


def test_a_file_may_be_given_twice_under_two_names(here: Path) -> None:
    torch.save({"happy": {1: tensor(1)}, "sad": {1: tensor(1)}}, here / "m#1.pt")
    norms = here / "norms.json"
    pack = import_pack(
        [VectorSource("sad", "m#1.pt"), VectorSource("joy", "m#1.pt#happy")],
        ImportTarget("p", "p", 1.0, 1.0), "model", norms=NormSource(norms),
    )  # fmt: skip
    assert [*pack.directions] == ["sad", "joy"]
    files = pack.manifest.method.settings["files"]
    assert files["sad"] == files["joy"]
