"""The table of autoencoders that can be imported: each row run with a folder written as its tool writes it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.offline.convert_cases import HIDDEN, config_folder
from tests.offline.sae_cases import (
    Autoencoder,
    autoencoder,
    gemma_scope_file,
    new_config,
    old_config,
    saelens_folder,
)
from tests.offline.test_convert_tools import BLOCKS, TABLE
from vllm_steer.cli import main
from vllm_steer.packs.pack import SteeringPack, load_pack

ROWS = [
    [cell.strip() for cell in line.strip("|").split(" | ")]
    for line in TABLE.partition("## Sparse autoencoders")[2].splitlines()
    if line.startswith("| ") and not line.startswith("| tool")
]
POST, PRE = "blocks.12.hook_resid_post", "blocks.12.hook_resid_pre"
SAE = autoencoder(HIDDEN, 20, jumps=False)
JUMPING = autoencoder(HIDDEN, 20, jumps=True)
SCOPE = autoencoder(HIDDEN, 20, jumps=True, shifts=False)
FACTORS = 1.0 + torch.arange(20) / 10
ENCODER, DECODER = (SAE.w_enc[:, 7].numpy(), SAE.w_dec[7].numpy())


def older(sae: Autoencoder) -> dict[str, Any]:
    config = old_config(sae, POST)
    renamed = {"hook_name": "hook_point", "hook_layer": "hook_point_layer"}
    config = {renamed.get(key, key): value for key, value in config.items()}
    for key in ("architecture", "apply_b_dec_to_input", "finetuning_scaling_factor"):
        del config[key]
    return config | {"hook_point_head_index": None, "normalize_activations": False}


def gpt2() -> None:
    config = {
        "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_embd": HIDDEN, "n_layer": BLOCKS, "n_head": 2,
        "vocab_size": 32,
    }  # fmt: skip
    Path("model/config.json").write_text(json.dumps(config))


def written(name: str, config: dict[str, Any], sae: Autoencoder = SAE, **more: torch.Tensor) -> Any:
    return lambda folder: saelens_folder(folder / name, sae, config, **more)


def vectors(encoder: np.ndarray, decoder: np.ndarray) -> Callable[[SteeringPack], bool]:
    return lambda pack: bool(
        np.allclose(pack.vectors["7 encoder"][0], encoder, rtol=1e-6, atol=1e-7)
        and np.allclose(pack.vectors["7"][0], decoder, rtol=1e-6, atol=1e-7)
    )


def centered(folder: Path) -> None:
    gpt2()
    saelens_folder(folder / "centered", SAE, old_config(SAE, POST))


def scope(folder: Path) -> None:
    gemma_scope_file(folder, SCOPE, 12)


def moved(folder: Path) -> None:
    gemma_scope_file(folder / "x", SCOPE, 12).rename(folder / "params.npz")


PLAIN = vectors(ENCODER, DECODER)
OF_SCOPE = vectors(SCOPE.w_enc[:, 7].numpy(), SCOPE.w_dec[7].numpy())
OF_JUMPING = vectors(JUMPING.w_enc[:, 7].numpy(), JUMPING.w_dec[7].numpy())
# By what stands in the column "give": the writer, what must hold of the pack; None for a refusal.
CASES: dict[str, tuple[Callable[[Path], Any], Callable[[SteeringPack], bool] | None]] = {
    "new --features 7": (written("new", new_config(SAE, POST)), PLAIN),
    "old --features 7 rain=3": (
        written("old", old_config(SAE, PRE)),
        lambda pack: PLAIN(pack) and "rain" in pack.directions,
    ),
    "older --features 7": (written("older", older(SAE)), PLAIN),
    "jump --features 7": (
        written("jump", new_config(JUMPING, POST), JUMPING),
        lambda pack: (
            OF_JUMPING(pack) and pack.directions["7"].form.threshold == JUMPING.threshold[7].item()
        ),
    ),
    "module --features 7": (written("module", new_config(SAE, "model.layers.12")), PLAIN),
    "tuned --features 7": (
        written(
            "tuned", old_config(SAE, POST, finetuning_scaling_factor=True), scaling_factor=FACTORS
        ),
        vectors(ENCODER, 1.7 * DECODER),
    ),
    "average --features 7 --norm-scaling-factor 0.5": (
        written("average", old_config(SAE, POST, normalize_activations="expected_average_only_in")),
        vectors(0.5 * ENCODER, 2.0 * DECODER),
    ),
    "centered --features 7 --centered": (centered, vectors(ENCODER - ENCODER.mean(), DECODER)),
    "gemma-scope-2b-pt-res/layer_12/width_16k/average_l0_71 --features 7": (scope, OF_SCOPE),
    "params.npz --features 7 --hook blocks.12.hook_resid_post": (moved, OF_SCOPE),
    "topk --features 7": (written("topk", new_config(SAE, POST, architecture="topk", k=4)), None),
    "gated --features 7": (written("gated", new_config(SAE, POST, architecture="gated")), None),
    "transcoder --features 7": (
        written("transcoder", new_config(SAE, POST, architecture="transcoder")),
        None,
    ),
    "normed --features 7": (
        written("normed", new_config(SAE, POST, normalize_activations="layer_norm")),
        None,
    ),
    "embeddings --features 7": (
        written("embeddings", new_config(SAE, "blocks.0.hook_resid_pre")),
        None,
    ),
    "part --features 7": (written("part", new_config(SAE, "blocks.12.hook_mlp_out")), None),
}


def test_every_row_has_a_case() -> None:
    assert [cells[2].strip("`") for cells in ROWS] == list(CASES)


@pytest.mark.parametrize("cells", ROWS, ids=lambda cells: cells[2].strip("`"))
def test_row(
    cells: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given, becomes = cells[2].strip("`"), cells[3]
    write, holds = CASES[given]
    monkeypatch.chdir(tmp_path)
    config_folder(tmp_path / "model", BLOCKS)
    (tmp_path / "norms.json").write_text(json.dumps(dict.fromkeys(range(BLOCKS), 10.0)))
    write(tmp_path)
    status = main(
        ["convert", "import-sae", *given.split(), "--scale", "4", "--model", "model", "--name", "p", "--out", "p",
         "--residual-norms", "norms.json"]
    )  # fmt: skip
    shown = capsys.readouterr().err
    if holds is None:
        assert status == 1
        assert becomes.startswith("refused")
        assert shown.startswith(f"vllm-steer: {given.split()[0]}")
        return
    assert status == 0, shown
    pack = load_pack("p")
    (layer,) = pack.directions["7"].layers
    assert becomes.startswith(f"layer {layer}")
    assert holds(pack)
