"""Vector files become packs, from Python and on the command line."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from tests.offline.convert_cases import (
    HIDDEN,
    config_folder,
    moods_pack,
    rows,
    write_control_vector,
)
from vllm_steer.cli import main
from vllm_steer.offline.convert.packs import (
    ImportTarget,
    NormSource,
    VectorSource,
    export_direction,
    import_pack,
)
from vllm_steer.offline.demo import demo_model_path
from vllm_steer.packs.pack import SteeringPack, load_pack


@pytest.fixture
def pack(tmp_path: Path) -> SteeringPack:
    return moods_pack(tmp_path)


@pytest.fixture
def config_dir(tmp_path: Path) -> Path:
    """A model directory without weights and tokenizer."""
    return config_folder(tmp_path / "model", 4)


def test_round_trip(pack: SteeringPack, config_dir: Path, tmp_path: Path) -> None:
    export_direction(pack, "happy", tmp_path / "happy.gguf")
    again = import_pack(
        [VectorSource("happy", tmp_path / "happy.gguf")],
        ImportTarget("again", tmp_path / "again", 3.0, 5.0), config_dir, norms=NormSource(pack.path),
    )  # fmt: skip
    assert again.digests["happy"] == pack.digests["happy"]
    record = again.directions["happy"]
    assert (record.layers, record.default_scale, record.safe_scale) == ([1, 3], 3.0, 5.0)
    assert again.manifest.method.name == "imported"
    assert again.manifest.method.settings["residual_norms"] == "given"
    assert again.manifest.residual_norms == pack.manifest.residual_norms
    assert again.manifest.model.hidden_size == HIDDEN


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
        (["--residual-norms", "norms.json", "--name", "../x"], "letters, digits"),
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
