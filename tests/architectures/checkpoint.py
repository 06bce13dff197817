"""Writes the tiny random checkpoint of a family, and a steering pack for it."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.architectures.families import LAYERS, Family
from vllm_steer.packs.pack import ModelIdentity, SteeringPack
from vllm_steer.testing.random_pack import write_random_pack

DIRECTIONS = ("first", "second")
# Large enough that logits are far from ties and every part of a block counts.
DEVIATION = 0.2


def write_checkpoint(family: Family, root: Path) -> SteeringPack:
    """Writes a checkpoint, and beside its weights the pack ``random`` of unit vectors on all layers.

    Args:
        family: Its family.
        root: Directory to write; the pack goes to ``root/pack``.
    """
    model = _random_model(family)
    model.save_pretrained(root)
    config = model.config.get_text_config()
    identity = ModelIdentity(
        name=root.name,
        architecture=type(model).__name__,
        model_type=model.config.model_type,
        hidden_size=config.hidden_size,
        num_layers=config.num_hidden_layers,
        chat_template_sha256=None,
    )
    return write_random_pack(
        root / "pack",
        "random",
        identity,
        dict.fromkeys(DIRECTIONS, range(LAYERS)),
        seed=1,
        default_scale=4.0,
        safe_scale=100.0,
        residual_norm=4.0,
    )


@torch.no_grad()
def _random_model(family: Family) -> PreTrainedModel:
    config = getattr(transformers, family.config)(**family.fields)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator) * DEVIATION
        if parameter.ndim < 2:
            # Norms and biases keep the centre that their kind has, one or zero.
            parameter.add_(noise)
        else:
            parameter.copy_(noise)
    return model
