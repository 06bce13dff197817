"""What the soak serves: a deep random model that changes compound in, and packs of unit vectors."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from vllm_steer.offline.demo import demo_model_path
from vllm_steer.packs.pack import SteeringPack
from vllm_steer.testing.random_pack import checkpoint_identity, write_random_pack

LAYERS = 24
CALM, DEEP, SWING = "calm", "deep", "swing"
DIRECTIONS = ("a", "b", "c", "d")


@dataclass(frozen=True)
class Load:
    """How much clients ask for.

    Attributes:
        bystanders: Clients that do nothing wrong.
        prompt: Most tokens of a prompt.
        answers: Lengths of answers, in tokens; the last is the longest.
        samples: Most answers of one request.
        timeout: Seconds after which a bystander's request counts as stuck.
    """

    bystanders: int
    prompt: int
    answers: tuple[int, ...]
    samples: int
    timeout: float


FULL = Load(bystanders=4, prompt=300, answers=(1, 20, 150), samples=8, timeout=180.0)
# For a server that answers ten tokens a second.
LIGHT = Load(bystanders=1, prompt=40, answers=(1, 4, 12), samples=2, timeout=400.0)

# Large enough that logits are far from ties, and that every part of a block counts.
_DEVIATION = 0.1
# About what such a model's residual stream has.
_NORM = 16.0


@torch.no_grad()
def write_model(path: Path) -> Path:
    """Writes a Llama of many small blocks with random weights, and the demo model's tokenizer."""
    config = AutoConfig.from_pretrained(
        demo_model_path(),
        num_hidden_layers=LAYERS,
        hidden_size=128,
        intermediate_size=256,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.normal_(0.0, _DEVIATION)
    model.save_pretrained(path)
    for file in demo_model_path().iterdir():
        if "token" in file.name or "template" in file.name:
            shutil.copy(file, path / file.name)
    return path


def write_packs(model: Path, folder: Path) -> list[SteeringPack]:
    """Writes the bystanders' pack, the hostile clients', and one that comes and goes."""
    identity = checkpoint_identity(model)
    return [
        write_random_pack(
            folder / name,
            name,
            identity,
            dict.fromkeys(DIRECTIONS, range(LAYERS)),
            seed=seed,
            default_scale=4.0,
            safe_scale=100.0,
            residual_norm=_NORM,
        )
        for seed, name in enumerate((CALM, DEEP, SWING))
    ]
