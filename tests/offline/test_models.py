"""What a model runs in, and what an engine for offline work takes of the machine."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Gemma2Config, Gemma2ForCausalLM
from vllm.engine.arg_utils import EngineArgs

import vllm_steer.offline.engine.llm
from vllm_steer.cli import main
from vllm_steer.errors import EvaluationError, ExtractionError, PackError
from vllm_steer.offline.demo import demo_model_path
from vllm_steer.offline.engine.llm import start_engine
from vllm_steer.offline.models.loading import chosen_dtype, load_config, load_model, model_identity
from vllm_steer.packs.registry import PackRegistry
from vllm_steer.testing.random_pack import write_random_pack
from vllm_steer.vllm_compat.model_shape import model_shape

CORES = "VLLM_CPU_NUM_OF_RESERVED_CPU"
PROCESSES = "VLLM_ENABLE_V1_MULTIPROCESSING"


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


def test_attention_that_hands_out_no_weights_computes_the_same(tmp_path: Path) -> None:
    """Gemma 2 caps attention logits, which torch's fused kernel cannot."""
    shape = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    size = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "head_dim": 16}
    # So low that every logit is near it.
    capped = {"attn_logit_softcapping": 0.5, "query_pre_attn_scalar": 1}
    torch.manual_seed(0)
    config = Gemma2Config(**shape, **size, **capped, initializer_range=0.5)
    Gemma2ForCausalLM(config).save_pretrained(tmp_path)
    token_ids = torch.arange(3, 23)[None]
    with torch.inference_mode():
        eager, own, fused = (
            load_model(tmp_path, "float32", "cpu", attention)(token_ids).logits
            for attention in ("eager", None, "sdpa")
        )
    assert torch.allclose(own, eager, atol=1e-4)
    assert not torch.allclose(fused, eager, atol=1e-2)


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
        # Stored in eight bits, with a scale that is nowhere or under a name of its own.
        ({UP: torch.ones(448, 256, dtype=torch.int8)}, {}, f"stores '{UP}' as I8"),
        ({UP: torch.ones(448, 256).to(torch.float8_e4m3fn)}, {}, f"stores '{UP}' as F8_E4M3"),
        (
            {UP: torch.ones(448, 256).to(torch.float8_e4m3fn), f"{UP}_scale_inv": torch.ones(4, 2)},
            {},
            "no place for",
        ),
        # As GPTQ packs them.
        (
            {
                UP: None,
                UP.replace("weight", "qweight"): torch.ones(32, 448, dtype=torch.int32),
                UP.replace("weight", "scales"): torch.ones(2, 448),
            },
            {},
            f"lacks 1 weights of the model, such as '{UP}'",
        ),
        # Under another name.
        ({UP: None, UP.replace("up_proj", "w3"): torch.ones(448, 256)}, {}, "lacks 1 weights"),
        ({UP: torch.ones(448, 8)}, {}, "has 1 weights of another shape"),
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


QUANTISED = {
    "awq": {"bits": 4, "group_size": 128, "version": "gemm", "zero_point": True},
    "gptq": {"bits": 4, "group_size": 128, "desc_act": False},
    "bitsandbytes": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "fp8": {"activation_scheme": "dynamic", "weight_block_size": [128, 128]},
    "mxfp4": {},
    # Of this one the library only warns.
    "modelopt": {"quant_algo": "FP8"},
    # A reader of this one is installed, and stumbles.
    "compressed-tensors": {"format": "pack-quantized", "config_groups": {}},
}


def quantised(path: Path, method: str) -> Path:
    """The demo model, with its tokenizer, that says it is quantised."""
    given = {"quant_method": method, **QUANTISED[method]}
    changed(path, {}, quantization_config=given)
    for file in demo_model_path().iterdir():
        if not (path / file.name).exists():
            shutil.copy(file, path)
    return path


@pytest.mark.parametrize("method", QUANTISED)
def test_a_quantised_checkpoint_is_refused_with_what_to_do(
    method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By both commands, and where it can be told before an engine answers for hours."""
    path = quantised(tmp_path / "model", method)
    (tmp_path / "concepts.txt").write_text("spiders\n")
    torch.save({3: torch.ones(256)}, tmp_path / "v.pt")
    common = ["--model", str(path), "--name", "n", "--out", str(tmp_path / "out")]
    concepts = ["--concepts", str(tmp_path / "concepts.txt"), "--class", "fears"]
    early = method != "compressed-tensors"
    for command in (
        [
            "extract",
            *concepts,
            *common,
            *([] if early else ["--learn-from", "prompts", "--estimator", "ridge"]),
        ],
        ["convert", "import", f"v={tmp_path / 'v.pt'}", *common],
    ):
        assert main(command) == 1
        shown = capsys.readouterr().err.splitlines()[-1]
        assert f"is quantised ({method})" in shown
        assert "give the unquantised model that it was made from, whose pack is served" in shown
    assert not list((tmp_path / "out").glob("*"))


@pytest.mark.parametrize("method", sorted(QUANTISED.keys() - {"bitsandbytes", "modelopt"}))
def test_a_pack_of_the_unquantised_model_belongs_to_the_quantised_one(
    method: str, tmp_path: Path
) -> None:
    """As vLLM reads its configuration; bitsandbytes and ModelOpt need a GPU for that."""
    config, tokenizer = load_config(demo_model_path())
    identity = model_identity(demo_model_path(), config, tokenizer)
    write_random_pack(
        tmp_path / "pack", "p", identity, {"a": [1, 2]}, seed=0, default_scale=1.0, safe_scale=2.0,
        residual_norm=10.0,
    )  # fmt: skip
    served = EngineArgs(model=str(quantised(tmp_path / "model", method))).create_model_config()
    assert served.quantization
    registry = PackRegistry.load([str(tmp_path / "pack")])
    registry.check_model(**model_shape(served))
    with pytest.raises(PackError, match="another model"):
        registry.check_model(**model_shape(served) | {"hidden_size": 512})


@pytest.mark.parametrize(
    ("file", "load"),
    [
        ("config.json", load_config),
        ("tokenizer.json", load_config),
        ("model.safetensors", lambda path: load_model(path, "float32", "cpu")),
    ],
)
@pytest.mark.parametrize("kept", [0, 100])
def test_a_damaged_file_is_an_error_of_extraction(
    file: str, load: Callable[[Path], Any], kept: int, tmp_path: Path
) -> None:
    """Its readers are several libraries, and raise errors of their own."""
    path = tmp_path / "model"
    shutil.copytree(demo_model_path(), path)
    (path / file).write_bytes((path / file).read_bytes()[:kept])
    with pytest.raises(
        ExtractionError, match=r"cannot load a (model|tokenizer) from .*/model': .+"
    ):
        load(path)


def test_what_a_language_model_has_no_part_in_may_be_left_over(tmp_path: Path) -> None:
    more = {
        "vision_tower.blocks.0.weight": torch.ones(2),
        "model.multi_modal_projector.weight": torch.ones(2),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2),
        "mtp.layers.0.weight": torch.ones(2),
    }
    assert load_model(changed(tmp_path / "model", more), "float32", "cpu").num_parameters()


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("given", [None, "1"])
def test_an_offline_engine_takes_every_core_and_starts_quickly_unless_told(
    monkeypatch: pytest.MonkeyPatch, given: str | None, quick: bool
) -> None:
    seen: list[tuple[str | None, str | None]] = []

    def engine(**_: Any) -> SimpleNamespace:
        seen.append((os.environ.get(CORES), os.environ.get(PROCESSES)))
        if len(seen) > 1:
            raise ValueError("no room")
        return SimpleNamespace()

    monkeypatch.setattr("vllm.LLM", engine)
    monkeypatch.setattr(vllm_steer.offline.engine.llm, "memory_settings", lambda *_: {})
    for name in (CORES, PROCESSES):
        monkeypatch.delenv(name, raising=False)
        if given is not None:
            monkeypatch.setenv(name, given)
    start_engine("model", [], {}, quick=quick)
    with pytest.raises(EvaluationError, match="no room"):
        start_engine("model", [], {}, quick=quick)
    assert seen == [(given or "0", given or ("0" if quick else None))] * 2
    assert os.environ.get(CORES) == os.environ.get(PROCESSES) == given
