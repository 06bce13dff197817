"""Small packs with random vectors for the tests that need no model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.random_pack import random_identity, write_random_pack
from vllm_steer.config import GRAPH_REVISION, ResolvedConfig, plugin_version
from vllm_steer.pack import SteeringPack

HIDDEN = 16
LAYERS = 4


def make_pack(
    path: Path, name: str, directions: dict[str, list[int]], seed: int = 0
) -> SteeringPack:
    """Writes a pack with random unit vectors at the layers given by direction."""
    return write_random_pack(
        path,
        name,
        random_identity(HIDDEN, LAYERS),
        directions,
        seed=seed,
        default_scale=2.0,
        safe_scale=4.0,
        residual_norm=10.0,
    )


@pytest.fixture
def pack_at(tmp_path: Path) -> Callable[..., SteeringPack]:
    def make(name: str, directions: dict[str, list[int]], seed: int = 0) -> SteeringPack:
        return make_pack(tmp_path / name, name, directions, seed)

    return make


@pytest.fixture
def fears(pack_at: Callable[..., SteeringPack]) -> SteeringPack:
    return pack_at("fears", {"spiders": [1, 2, 3], "New York": [0, 2]})


def resolved(**fields: Any) -> ResolvedConfig:
    """The configuration of an engine with plenty of room, but for ``fields``."""
    given: dict[str, Any] = {
        "packs": ["/packs/fears"],
        "rows": 65,
        "sums_per_request": 4,
        "gated": False,
        "layers": list(range(LAYERS)),
        "digests": ["0" * 64],
        "version": plugin_version(),
        "graph_revision": GRAPH_REVISION,
    }
    return ResolvedConfig(**(given | fields))
