"""What a model runs in, and what an engine for offline work takes of the machine."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import offline.engine
from offline.demo import demo_model_path
from offline.engine import start_engine
from offline.models import chosen_dtype, load_model
from vllm_steer.errors import EvaluationError, ExtractionError

CORES = "VLLM_CPU_NUM_OF_RESERVED_CPU"


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [({"amx_bf16": True}, "bfloat16"), ({"amx_bf16": False}, "float32"), ({}, "float32")],
)
def test_a_cpu_takes_bfloat16_where_it_is_made_for_it(
    monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, bool], expected: str
) -> None:
    """Others can do it too, but more slowly than float32."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert chosen_dtype("auto", "cpu") == expected
    assert chosen_dtype("float16", "cpu") == "float16"
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert chosen_dtype("auto", "cpu") == "float32"


def changed(path: Path, tensors: dict[str, torch.Tensor | None], **config: Any) -> Path:
    """The demo model with some weights added or, where they are None, left out."""
    source = demo_model_path()
    path.mkdir()
    weights = load_file(source / "model.safetensors") | tensors
    save_file(
        {key: value for key, value in weights.items() if value is not None},
        path / "model.safetensors",
        {"format": "pt"},
    )
    known = json.loads((source / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(known | config))
    return path


UP = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("tensors", "config", "message"),
    [
        (
            {f"{UP}_scale": torch.ones(1)},
            {},
            "has 1 weights that the model has no place for, such as",
        ),
        ({"model.layers.6.mlp.up_proj.weight": torch.ones(448, 256)}, {}, "has no place for"),
        ({UP: None}, {}, f"lacks 1 weights of the model, such as '{UP}'"),
        ({UP: torch.ones(8, 256)}, {}, "cannot load a model|of another shape"),
        ({}, {"quantization_config": {"quant_method": "modelopt"}}, "quantised"),
        ({}, {"quantization_config": {"quant_method": "awq", "bits": 4}}, "cannot load|quantised"),
    ],
)
def test_a_model_that_is_not_that_of_its_checkpoint_is_refused(
    tensors: dict[str, torch.Tensor | None], config: dict[str, Any], message: str, tmp_path: Path
) -> None:
    """The library warns of it and goes on."""
    with pytest.raises(ExtractionError, match=message):
        load_model(changed(tmp_path / "model", tensors, **config), "float32", "cpu")


def test_what_a_language_model_has_no_part_in_may_be_left_over(tmp_path: Path) -> None:
    more = {
        "vision_tower.blocks.0.weight": torch.ones(2),
        "model.multi_modal_projector.weight": torch.ones(2),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2),
        "mtp.layers.0.weight": torch.ones(2),
    }
    assert load_model(changed(tmp_path / "model", more), "float32", "cpu").num_parameters()


@pytest.mark.parametrize("given", [None, "1"])
def test_an_offline_engine_takes_every_core_unless_told(
    monkeypatch: pytest.MonkeyPatch, given: str | None
) -> None:
    seen: list[str | None] = []

    def engine(**_: Any) -> SimpleNamespace:
        seen.append(os.environ.get(CORES))
        if len(seen) > 1:
            raise ValueError("no room")
        return SimpleNamespace()

    monkeypatch.setattr("vllm.LLM", engine)
    monkeypatch.setattr(offline.engine, "memory_settings", lambda *_: {})
    monkeypatch.delenv(CORES, raising=False)
    if given is not None:
        monkeypatch.setenv(CORES, given)
    start_engine("model", [], {})
    with pytest.raises(EvaluationError, match="no room"):
        start_engine("model", [], {})
    assert seen == [given or "0"] * 2
    assert os.environ.get(CORES) == given
