"""Models and packs to measure with: the demo model, or random weights in the shape of real ones.

A random model is a configuration and a word-level tokenizer on disk; its weights are drawn while
the engine loads it, the same ones in every engine, so nothing large is written or downloaded.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zlib import crc32

from vllm_steer.offline.demo import demo_model_path
from vllm_steer.packs.pack import ModelIdentity, SteeringPack
from vllm_steer.testing.random_pack import checkpoint_identity, write_random_pack

RANDOM_LOAD_FORMAT = "benchmark_random"
DEMO = "demo"
# Kept between runs: paths are part of the key of vLLM's compile cache.
WORK = Path.home() / ".cache" / "vllm-steer-benchmarks"
MAX_POSITIONS = 4096
PACK_NAME = "bench"
# Standard deviation of random weights, as models of these shapes are initialised.
WEIGHT_SCALE = 0.02


@dataclass(frozen=True)
class Shape:
    """A Llama-shaped model."""

    hidden: int
    mlp: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    tied: bool = False


SHAPES = {
    "tiny": Shape(256, 768, 4, 4, 2, 2048),
    "100m": Shape(768, 2048, 12, 12, 4, 32000),
    "1.5b": Shape(1536, 8960, 28, 12, 2, 151936, tied=True),
    "8b": Shape(4096, 14336, 32, 32, 8, 128256),
}


@dataclass(frozen=True)
class BenchModel:
    """A model directory and how vLLM is to load it.

    Attributes:
        name: Name in reports.
        path: Directory.
        load_format: vLLM's ``load_format``.
        parameters: Number of weights.
        identity: The model as packs name it.
        vocabulary: Tokens that prompts may use.
    """

    name: str
    path: Path
    load_format: str
    parameters: int
    identity: ModelIdentity
    vocabulary: int


def prepare_model(name: str, folder: Path) -> BenchModel:
    """Returns the demo model, a random one of :data:`SHAPES`, or a checkpoint directory.

    Args:
        name: ``demo``, a key of :data:`SHAPES`, or a path.
        folder: Where a random model is written.
    """
    load_format = "auto"
    if name == DEMO:
        path = demo_model_path()
    elif name in SHAPES:
        path, load_format = folder / name, RANDOM_LOAD_FORMAT
        _write_random_model(path, SHAPES[name])
    else:
        path = Path(name)
    config = json.loads((path / "config.json").read_text())
    return BenchModel(
        name,
        path,
        load_format,
        _count_parameters(config),
        checkpoint_identity(path),
        config["vocab_size"],
    )


def write_pack(model: BenchModel, folder: Path, directions: int) -> SteeringPack:
    """Writes a pack of random unit directions at all layers, named ``d0``, ``d1``, …"""
    layers = range(model.identity.num_layers)
    return write_random_pack(
        folder / f"{model.path.name}-pack-{directions}",
        PACK_NAME,
        model.identity,
        {f"d{number}": layers for number in range(directions)},
        seed=0,
        default_scale=1.0,
        safe_scale=1.0,
        residual_norm=10.0,
    )


def register_random_weights() -> None:
    """Teaches vLLM in this process to draw weights instead of reading them."""
    import torch
    from vllm.model_executor.model_loader import register_model_loader
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader

    @register_model_loader(RANDOM_LOAD_FORMAT)
    class RandomWeights(BaseModelLoader):  # type: ignore[misc]
        """Normal matrices, unit norms; vLLM's own dummy weights give nearly equal logits."""

        def download_model(self, model_config: Any) -> None:
            """There is nothing to download."""

        def load_weights(self, model: Any, model_config: Any) -> None:
            """Fills the parameters in the order of their names."""
            for name, weight in sorted(model.named_parameters()):
                generator = torch.Generator(weight.device).manual_seed(crc32(name.encode()))
                if weight.ndim == 1:
                    weight.data.fill_(1.0)
                else:
                    weight.data.normal_(0.0, WEIGHT_SCALE, generator=generator)


def _write_random_model(path: Path, shape: Shape) -> None:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.mlp,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.hidden // shape.heads,
        "vocab_size": shape.vocabulary,
        "max_position_embeddings": MAX_POSITIONS,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "rope_theta": 500000.0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": shape.tied,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    words = ["<unk>", "<s>", "</s>", *(f"t{number}" for number in range(3, shape.vocabulary))]
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": None,
        "decoder": None,
        "added_tokens": [
            {"id": number, "content": word, "special": True, **special}
            for number, word in enumerate(words[:3])
        ],
        "model": {
            "type": "WordLevel",
            "unk_token": "<unk>",
            "vocab": {word: number for number, word in enumerate(words)},
        },
    }
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": MAX_POSITIONS,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    path.mkdir(parents=True, exist_ok=True)
    contents = {
        "config.json": config,
        "tokenizer.json": tokenizer,
        "tokenizer_config.json": settings,
    }
    for file, content in contents.items():
        (path / file).write_text(json.dumps(content))


def _count_parameters(config: dict[str, Any]) -> int:
    """Weights of a Llama-shaped model; those of others are near enough for a report."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    head = config.get("head_dim") or hidden // heads
    attention = 2 * hidden * head * (heads + config.get("num_key_value_heads", heads))
    block = attention + 3 * hidden * config["intermediate_size"] + 2 * hidden
    embeddings = config["vocab_size"] * hidden * (1 if config.get("tie_word_embeddings") else 2)
    return int(config["num_hidden_layers"] * block + embeddings + hidden)
