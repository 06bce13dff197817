"""LoReFT files become packs that do what they did, or are refused with the reason."""

from __future__ import annotations

import json
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.offline.convert_cases import HIDDEN, config_folder, moods_pack
from vllm_steer.cli import main
from vllm_steer.errors import ConversionError
from vllm_steer.offline.convert.model import NormSource
from vllm_steer.offline.convert.packs import VectorSource
from vllm_steer.offline.convert.reft import import_reft
from vllm_steer.offline.train.directions import Target
from vllm_steer.offline.train.positions import Positions
from vllm_steer.packs.pack import SteeringPack, load_pack
from vllm_steer.request.positions import plain_positions
from vllm_steer.verify.oracle_forms import apply_form

LAYERS, RANK = (1, 3), 3
KEY = "intkey_layer_{}_comp_block_output_unit_pos_nunit_1#{}.bin"
MODULE_KEY = "intkey_comp_model_layers[{}]_output_unit_pos_nunit_1#{}.bin"


class Loreft(nn.Module):
    """The authors' intervention, written from its formula; its state is what pyreft saves of it."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.learned_source = nn.Linear(HIDDEN, RANK)
        self.rotate = torch.linalg.qr(torch.randn(HIDDEN, RANK)).Q

    @torch.no_grad()
    def forward(self, base: Tensor) -> Tensor:
        return base + (self.learned_source(base) - base @ self.rotate) @ self.rotate.T

    def saved(self) -> OrderedDict[str, Tensor]:
        state = OrderedDict(self.learned_source.state_dict())
        state["rotate_layer"] = self.rotate
        return state


@pytest.fixture
def forms() -> dict[int, Loreft]:
    return {layer: Loreft(layer) for layer in LAYERS}


@pytest.fixture
def config_dir(tmp_path: Path) -> Path:
    return config_folder(tmp_path / "model", 4)


def pyreft_folder(folder: Path, forms: dict[int, Loreft], key: str = KEY, number: int = 0) -> Path:
    folder.mkdir(exist_ok=True)
    for layer, form in forms.items():
        torch.save(form.saved(), folder / key.format(layer, number))
    (folder / "config.json").write_text("{}")
    return folder


def safetensors_file(file: Path, forms: dict[int, Loreft], rotation: str) -> Path:
    tensors = {}
    for layer, form in forms.items():
        at = f"base_model.model.model.layers.{layer}"
        tensors[f"{at}.learned_source.weight"] = form.learned_source.weight.detach()
        tensors[f"{at}.learned_source.bias"] = form.learned_source.bias.detach()
        tensors[f"{at}.{rotation}"] = form.rotate
    save_file({name: value.contiguous() for name, value in tensors.items()}, file)
    return file


def imported(source: Path | str, config_dir: Path, tmp_path: Path) -> SteeringPack:
    given = moods_pack(tmp_path).path
    return import_reft(
        [VectorSource("it", source)],
        Target("reft", tmp_path / "out"),
        config_dir,
        Positions.parse("f5+l5").served(),
        NormSource(given),
    )


def assert_does_the_same(pack: SteeringPack, forms: dict[int, Loreft]) -> None:
    """Every operation by its own formula, summed."""
    hidden = torch.randn(6, HIDDEN, generator=torch.Generator().manual_seed(0))
    for layer, form in forms.items():
        total = hidden.clone()
        for name, record in pack.directions.items():
            if name.endswith(" read"):
                continue
            at = record.layers.index(layer)
            reader = record.form and record.form.read
            read = torch.tensor(pack.vectors[reader][at]) if reader else None
            vector = torch.tensor(pack.vectors[name][at])
            choice = {"op": record.op}
            total += apply_form(hidden, vector, record.default_scale, choice, read=read) - hidden
        torch.testing.assert_close(total, form(hidden), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("key", [KEY, MODULE_KEY])
def test_a_folder_of_pyreft(forms, config_dir, tmp_path, key) -> None:
    pack = imported(pyreft_folder(tmp_path / "reft", forms, key), config_dir, tmp_path)
    assert_does_the_same(pack, forms)
    assert list(pack.directions)[:4] == ["it bias", "it 1", "it 2", "it 3"]
    record = pack.directions["it 1"]
    assert (record.layers, record.op) == ([1, 3], "affine")
    assert plain_positions(record.positions) == {"prompt": [[0, 5], [-5, None]]}
    method = pack.manifest.method
    assert (method.name, method.settings["form"]) == ("imported", "loreft")
    assert [file["format"] for file in method.settings["files"]["it"]] == ["pt", "pt"]


@pytest.mark.parametrize("rotation", ["rotate_layer", "rotate_layer.weight"])
def test_a_safetensors_file(forms, config_dir, tmp_path, rotation) -> None:
    file = safetensors_file(tmp_path / "adapter_model.safetensors", forms, rotation)
    assert_does_the_same(imported(file, config_dir, tmp_path), forms)
    folder = tmp_path / "peft"
    folder.mkdir()
    file.rename(folder / file.name)
    assert_does_the_same(imported(folder, config_dir, tmp_path), forms)


def test_forms_of_first_and_last_tokens_are_told_apart(forms, config_dir, tmp_path) -> None:
    folder = pyreft_folder(tmp_path / "reft", forms)
    last = {layer: Loreft(10 + layer) for layer in LAYERS}
    pyreft_folder(folder, last, number=1)
    with pytest.raises(ConversionError, match=r"2 interventions at the same layers.*NAME=.*#0"):
        imported(folder, config_dir, tmp_path)
    assert_does_the_same(imported(f"{folder}#1", config_dir, tmp_path), last)
    assert_does_the_same(imported(f"{folder}#0", config_dir, tmp_path), forms)
    with pytest.raises(ConversionError, match="holds no intkey.* with #2"):
        imported(f"{folder}#2", config_dir, tmp_path)


def test_on_the_command_line(forms, config_dir, tmp_path, capsys) -> None:
    folder = pyreft_folder(tmp_path / "reft", forms)
    norms = moods_pack(tmp_path).path
    # fmt: off
    status = main([
        "convert", "import-reft", f"it={folder}", "--model", str(config_dir), "--name", "reft", "--out",
        str(tmp_path / "out"), "--positions", "last_prompt", "--residual-norms", str(norms),
    ])
    # fmt: on
    assert status == 0
    captured = capsys.readouterr()
    assert "activation function" in captured.err
    steering = json.loads("{" + captured.out[captured.out.index('"steering"') :] + "}")["steering"]
    assert len(steering["directions"]) == 1 + RANK
    assert load_pack(tmp_path / "out").directions["it 1"].positions == "last_prompt"


class Evil:
    def __reduce__(self):
        return (print, ("unpickled",))


def test_nothing_is_unpickled(forms, config_dir, tmp_path, capsys) -> None:
    folder = pyreft_folder(tmp_path / "reft", forms)
    torch.save({"weight": Evil()}, folder / KEY.format(1, 0))
    with pytest.raises(ConversionError, match="code is never unpickled"):
        imported(folder, config_dir, tmp_path)
    assert "unpickled" not in capsys.readouterr().out


def changed(forms: dict[int, Loreft], layer: int, **given: Tensor | None) -> list[dict]:
    states = [dict(form.saved()) for form in forms.values()]
    for name, value in given.items():
        if value is None:
            del states[LAYERS.index(layer)][name]
        else:
            states[LAYERS.index(layer)][name] = value
    return states


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rotate_layer": None}, r"layer 3 must have rotation \[16, 3\], and lacks it"),
        ({"bias": torch.zeros(2)}, r"layer 3 must have bias \[3\], and has \[2\]"),
        ({"weight": torch.zeros(3, 8)}, r"must have weight \[3, 16\], and has \[3, 8\]"),
        ({"bias": torch.tensor([0.0, np.nan, 0.0])}, "bias of layer 3 has NaN or Inf"),
        ({"rotate_layer": torch.ones(16, 3)}, "from orthonormal, so this is no LoReFT"),
        ({"proj_layer.weight": torch.zeros(3, 16)}, "holds 'proj_layer.weight', and a LoReFT form"),
        (
            {"rotate_layer.parametrizations.weight.original": torch.zeros(16, 3)},
            "of a parametrisation, save",
        ),
    ],
)
def test_what_is_no_loreft_form_is_refused(forms, config_dir, tmp_path, given, message) -> None:
    folder = tmp_path / "reft"
    folder.mkdir()
    for layer, state in zip(LAYERS, changed(forms, 3, **given), strict=True):
        torch.save(state, folder / KEY.format(layer, 0))
    with pytest.raises(ConversionError, match=message):
        imported(folder, config_dir, tmp_path)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("intkey_layer_{}_comp_mlp_output_unit_pos_nunit_1#{}.bin", "intervenes at 'mlp_output'"),
        ("intkey_layer_{}_comp_block_input_unit_pos_nunit_1#{}.bin", "intervenes at 'block_input'"),
        (
            "intkey_comp_model_layers[{}]_mlp_output_unit_pos_nunit_1#{}.bin",
            r"intervenes at 'model_layers\[1\]_mlp_output'",
        ),
        ("intkey_odd_{}_{}.bin", "says 0 layers"),
    ],
)
def test_other_sites_are_refused(forms, config_dir, tmp_path, key, message) -> None:
    with pytest.raises(ConversionError, match=message):
        imported(pyreft_folder(tmp_path / "reft", forms, key), config_dir, tmp_path)


def test_layers_that_the_model_does_not_have(config_dir, tmp_path) -> None:
    folder = pyreft_folder(tmp_path / "reft", {4: Loreft(0)})
    with pytest.raises(ConversionError, match=r"has layers \[4\]; the model has layers 0 to 3"):
        imported(folder, config_dir, tmp_path)


def test_a_part_of_a_block_is_refused(forms, config_dir, tmp_path) -> None:
    file = safetensors_file(tmp_path / "a.safetensors", forms, "mlp.rotate_layer")
    with pytest.raises(ConversionError, match="of a part of a block"):
        imported(file, config_dir, tmp_path)


def test_an_empty_folder_is_refused(config_dir, tmp_path) -> None:
    (tmp_path / "reft").mkdir()
    with pytest.raises(ConversionError, match="holds no intkey"):
        imported(tmp_path / "reft", config_dir, tmp_path)
