"""Small packs with random vectors for the tests that need no model."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from vllm_steer import log
from vllm_steer.config import GRAPH_REVISION, ResolvedConfig, plugin_version
from vllm_steer.packs.pack import (
    Calibration,
    PackContent,
    Probe,
    ProbeLayer,
    ProbeThreshold,
    SteeringPack,
    write_pack,
)
from vllm_steer.packs.registry import PackRegistry
from vllm_steer.plan.binding import bind
from vllm_steer.plan.resolve import resolve
from vllm_steer.plan.steering_plan import SteeringPlan
from vllm_steer.request.schema import parse
from vllm_steer.testing.random_pack import random_identity, write_random_pack

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


@pytest.fixture
def logged() -> Iterator[list[logging.LogRecord]]:
    """What is written to the log, whatever other tests and vLLM have made of its level and its parent."""
    records: list[logging.LogRecord] = []
    keeper = logging.Handler()
    keeper.emit = records.append  # type: ignore[method-assign]
    level = log.logger.level
    log.logger.addHandler(keeper)
    log.logger.setLevel(logging.DEBUG)
    yield records
    log.logger.setLevel(level)
    log.logger.removeHandler(keeper)


def calibrated(**fields: Any) -> Calibration:
    """What was measured of a direction that steers well, but for ``fields``."""
    point = {
        "gap_closed": 0.4,
        "expression": 0.6,
        "repetition": 0.1,
        "perplexity": 7.5,
        "fluent": True,
    }
    given: dict[str, Any] = {
        "model": "random",
        "dtype": "float32",
        "steers": True,
        "gap_closed": 0.42,
        "low": 0.31,
        "high": 0.55,
        "control": 0.02,
        "expression": 0.61,
        "repetition": 0.1,
        "repetition_prefixed": 0.08,
        "perplexity": 7.5,
        "fluent_dose": 0.8,
        "questions": 40,
        "questions_sha256": "0" * 64,
        "curve": [point | {"scale": 2.0}, point | {"scale": 4.0, "fluent": None}],
    }
    return Calibration.model_validate(given | fields)


def threshold(fpr: float, above: float, **fields: Any) -> ProbeThreshold:
    """A threshold of a probe, but for ``fields``."""
    shares = {
        f"{kind}_positives{end}": share
        for kind, share in (("false", fpr), ("true", 0.8))
        for end, share in (("", share), ("_low", share / 2), ("_high", 1.0))
    }
    given = {"fpr": fpr, "above": above, "low": above - 0.5, "high": None} | shares | fields
    return ProbeThreshold.model_validate(given)


def layer(number: int, above: float = 1.0, **fields: Any) -> ProbeLayer:
    """What a probe does at a layer, but for ``fields``."""
    thresholds = [threshold(0.01, above + 1.0), threshold(0.05, above)]
    given = {"layer": number, "auroc": 0.9, "low": 0.8, "high": 0.95, "thresholds": thresholds}
    return ProbeLayer.model_validate(given | fields)


def probe(**fields: Any) -> Probe:
    """A probe of layers 1 and 2, the second of which it is, but for ``fields``."""
    given: dict[str, Any] = {
        "model": "random",
        "dtype": "float32",
        "chat_template_sha256": None,
        "layer": 2,
        "score": "max",
        "tokens": "generated",
        "max_tokens": 48,
        "positives": 40,
        "negatives": 240,
        "positives_sha256": "0" * 64,
        "negatives_sha256": "1" * 64,
        "seed": 0,
        "layers": [layer(1, 7.0), layer(2, 3.0)],
    }
    return Probe.model_validate(given | fields)


def rewritten(
    pack: SteeringPack, path: Path | None = None, name: str | None = None, **changes: dict[str, Any]
) -> SteeringPack:
    """Writes a pack again, each direction's record with ``changes`` by its name."""
    return write_pack(
        path or pack.path,
        PackContent(
            name=name or pack.name,
            model=pack.manifest.model,
            directions=[
                record.model_copy(update=changes.get(record.name, {}))
                for record in pack.manifest.directions
            ],
            vectors=pack.vectors,
            method=pack.manifest.method,
            residual_norms={int(k): norm for k, norm in pack.manifest.residual_norms.items()},
        ),
    )


def resolved(**fields: Any) -> ResolvedConfig:
    """The configuration of an engine with plenty of room, but for ``fields``."""
    given: dict[str, Any] = {
        "packs": ["/packs/fears"],
        "rows": 65,
        "sums_per_request": 4,
        "queued": False,
        "layers": list(range(LAYERS)),
        "digests": ["0" * 64],
        "version": plugin_version(),
        "graph_revision": GRAPH_REVISION,
    }
    return ResolvedConfig(**(given | fields))


def plan(registry: PackRegistry, *directions: dict[str, Any], **fields: Any) -> SteeringPlan:
    """The plan of a request for a prompt of ten tokens, by these directions and with these fields."""
    request = parse({"steering": {"directions": list(directions)} | fields})
    assert request is not None
    return resolve(bind(request, registry), 10)
