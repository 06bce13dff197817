"""Small packs with random vectors for the tests that need no model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from vllm_steer.pack import (
    DirectionRecord,
    MethodRecord,
    ModelIdentity,
    SteeringPack,
    write_pack,
)

HIDDEN = 16
LAYERS = 4


def make_pack(
    path: Path, name: str, directions: dict[str, list[int]], seed: int = 0
) -> SteeringPack:
    """Writes a pack with random unit vectors at the layers given by direction."""
    generator = np.random.default_rng(seed)
    vectors = {
        key: generator.standard_normal((len(layers), HIDDEN)) for key, layers in directions.items()
    }
    vectors = {
        key: value / np.linalg.norm(value, axis=1, keepdims=True) for key, value in vectors.items()
    }
    return write_pack(
        path,
        name=name,
        model=ModelIdentity(
            name="random",
            architecture="LlamaForCausalLM",
            model_type="llama",
            hidden_size=HIDDEN,
            num_layers=LAYERS,
            chat_template_sha256=None,
        ),
        directions=[
            DirectionRecord(
                name=key, layers=layers, default_scale=2.0, safe_scale=4.0, positions="all"
            )
            for key, layers in directions.items()
        ],
        vectors=vectors,
        method=MethodRecord(
            name="random", settings={}, libraries={}, seed=seed, data_sha256="0" * 64
        ),
        residual_norms={layer: 10.0 for layer in range(LAYERS)},
    )


@pytest.fixture
def pack_at(tmp_path: Path) -> Callable[..., SteeringPack]:
    def make(name: str, directions: dict[str, list[int]], seed: int = 0) -> SteeringPack:
        return make_pack(tmp_path / name, name, directions, seed)

    return make


@pytest.fixture
def fears(pack_at: Callable[..., SteeringPack]) -> SteeringPack:
    return pack_at("fears", {"spiders": [1, 2, 3], "New York": [0, 2]})
