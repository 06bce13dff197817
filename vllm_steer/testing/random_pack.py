"""Steering packs that nobody learned: random unit vectors, and other packs by a factor."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from vllm_steer.packs.pack import (
    DirectionRecord,
    MethodRecord,
    ModelIdentity,
    PackContent,
    SteeringPack,
    write_pack,
)


def random_identity(hidden_size: int, num_layers: int, name: str = "random") -> ModelIdentity:
    """A Llama of a shape, which need not exist."""
    return _identity(name, "LlamaForCausalLM", "llama", hidden_size, num_layers)


def checkpoint_identity(path: Path) -> ModelIdentity:
    """The model of a checkpoint directory, as its configuration describes it."""
    config = json.loads((path / "config.json").read_text())
    return _identity(
        path.name,
        config["architectures"][0],
        config["model_type"],
        config["hidden_size"],
        config["num_hidden_layers"],
    )


def _identity(
    name: str, architecture: str, model_type: str, hidden_size: int, num_layers: int
) -> ModelIdentity:
    return ModelIdentity(
        name=name,
        architecture=architecture,
        model_type=model_type,
        hidden_size=hidden_size,
        num_layers=num_layers,
        chat_template_sha256=None,
    )


def write_random_pack(
    path: Path,
    name: str,
    model: ModelIdentity,
    directions: Mapping[str, Sequence[int]],
    *,
    seed: int,
    default_scale: float,
    safe_scale: float,
    residual_norm: float,
) -> SteeringPack:
    """Writes a pack of random unit vectors.

    Args:
        path: Directory of the pack.
        name: Its name.
        model: The model that it is for.
        directions: Name of each direction to its layers.
        seed: Seed of the vectors.
        default_scale: Default scale of each direction.
        safe_scale: Safe scale of each direction.
        residual_norm: Norm of the residual stream after every layer.
    """
    generator = np.random.default_rng(seed)
    vectors = {}
    for key, layers in directions.items():
        values = generator.standard_normal((len(layers), model.hidden_size))
        vectors[key] = values / np.linalg.norm(values, axis=1, keepdims=True)
    return write_pack(
        path,
        PackContent(
            name=name,
            model=model,
            directions=[
                DirectionRecord(
                    name=key,
                    layers=list(layers),
                    default_scale=default_scale,
                    safe_scale=safe_scale,
                    positions="all",
                )
                for key, layers in directions.items()
            ],
            vectors=vectors,
            method=MethodRecord(
                name="random",
                settings={},
                libraries={},
                seed=seed,
                data_sha256=hashlib.sha256(b"").hexdigest(),
            ),
            residual_norms=dict.fromkeys(range(model.num_layers), residual_norm),
        ),
    )


def write_variant(pack: SteeringPack, path: Path, name: str, factor: float) -> SteeringPack:
    """Writes a pack of the same directions, each vector multiplied by ``factor``."""
    return write_pack(
        path,
        PackContent(
            name=name,
            model=pack.manifest.model,
            directions=pack.manifest.directions,
            vectors={key: np.float32(factor) * vector for key, vector in pack.vectors.items()},
            method=pack.manifest.method,
            residual_norms={int(k): norm for k, norm in pack.manifest.residual_norms.items()},
        ),
    )
