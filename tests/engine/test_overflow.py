"""With every check of what a request may ask switched off, its overflow stays its own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from tests.engine.cases import SPIDERS
from vllm_steer.offline.demo import demo_model_path
from vllm_steer.packs.pack import SteeringPack
from vllm_steer.testing.engine import Engine, Output

pytestmark = pytest.mark.engine
TOKENS = 12
OTHER = "fears/heights"
# Rounding differs with the batch.
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.25, "float16": 0.05}
HUGE = (19_900.0, 1e30, 3e38)


def _one(**choice: Any) -> dict[str, Any]:
    return {"directions": [{"name": SPIDERS, "positions": "all"} | choice]}


POISON = [
    *(_one(scale=scale) for scale in HUGE),
    *(_one(scale=-scale, op="affine", read=OTHER) for scale in HUGE),
    *(_one(scale=scale, op="affine", read=SPIDERS, bias=min(scale, 1e9)) for scale in HUGE),
    *(_one(scale=scale, op="clamp") for scale in HUGE),
    *(_one(scale=-scale, op="ablate") for scale in HUGE),
    _one(scale=1e38, gate={"direction": OTHER, "above": -1e9}),
    *(_one(scale=scale, gate={"direction": OTHER, "above": 0.0, "slope": 1e9}) for scale in HUGE),
    *(_one(scale=scale, op="multiply") for scale in HUGE),
    *(
        _one(scale=-scale, op="multiply", gate={"direction": OTHER, "above": 0.0, "slope": 1e9})
        for scale in HUGE
    ),
    {
        "directions": [
            {"name": name, "scale": 3e38, "positions": "all"} for name in (SPIDERS, OTHER)
        ]
    },
]
BYSTANDERS = [None, _one(scale=6.0), _one(scale=0.5, op="ablate"), None]


def switch_checks_off() -> None:
    """Lets the front end and the engine take whatever can be written down."""
    import vllm_steer.engine.intake
    import vllm_steer.plan.resolve
    import vllm_steer.serving.admission

    for module in (vllm_steer.serving.admission, vllm_steer.engine.intake):
        module.check_distance = lambda *_: None
    vllm_steer.plan.resolve.check_scale = lambda *_: None


@pytest.fixture(scope="module", params=list(TOLERANCE))
def unbounded(request: pytest.FixtureRequest, packs: list[SteeringPack]) -> Iterator[Any]:
    """An engine whose few blocks of the key-value cache are used again and again."""
    steering = {"packs": [str(pack.path) for pack in packs], "ops": "affine", "multiply": True}
    arguments = {
        "model": str(demo_model_path()),
        "dtype": request.param,
        "max_model_len": 128,
        "max_num_seqs": 16,
        "num_gpu_blocks_override": 24,
        "kv_cache_memory_bytes": 2**26,
        "max_logprobs": -1,
        "enforce_eager": True,
        "additional_config": {"steering": steering},
    }
    engine = Engine(arguments, prepare=[switch_checks_off], fork=True)
    yield engine, TOLERANCE[request.param]
    engine.close()


def test_bystanders_get_what_they_get_alone(unbounded: Any, prompts: list[list[int]]) -> None:
    engine, tolerance = unbounded

    def asked(poison: list[Any]) -> list[Output]:
        steerings = [*BYSTANDERS, *poison]
        given = [prompts[number % len(prompts)] for number in range(len(steerings))]
        return engine.generate(given, steerings, TOKENS)[: len(BYSTANDERS)]

    quiet = asked([])
    for number, poison in enumerate([[one] for one in POISON] + [POISON, []]):
        for found, expected in zip(asked(poison), quiet, strict=True):
            assert np.isfinite(found.logprobs).all(), (number, poison)
            assert np.abs(found.logprobs[0] - expected.logprobs[0]).max() < tolerance, poison
            if tolerance < 0.01:
                assert found.tokens == expected.tokens, poison
