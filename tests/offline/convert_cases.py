"""A pack and vector files for the tests of conversion."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from gguf import GGUFWriter

from vllm_steer.packs.pack import SteeringPack
from vllm_steer.testing.random_pack import random_identity, write_random_pack

HIDDEN = 16
MODEL = random_identity(HIDDEN, 4)


def moods_pack(folder: Path) -> SteeringPack:
    """A pack of random vectors, one direction of which has layer 0."""
    return write_random_pack(
        folder / "moods", "moods", MODEL, {"happy": [1, 3], "low": [0, 2]},
        seed=0, default_scale=2.0, safe_scale=4.0, residual_norm=10.0,
    )  # fmt: skip


def config_folder(folder: Path, blocks: int) -> Path:
    """A model directory without weights and tokenizer."""
    folder.mkdir()
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN,
        "num_hidden_layers": blocks, "num_attention_heads": 2, "intermediate_size": 8, "vocab_size": 32,
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
