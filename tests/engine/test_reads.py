"""Scores of directions, per token: each equals Hugging Face with hooks, whatever else happens in the batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from tests.engine.cases import CHEERFUL, GLOOMY, HEIGHTS, SPIDERS
from tests.engine_process import EngineProcess, Output
from tests.reference import TOLERANCE, assert_equals_hooks
from vllm_steer.verify.oracle import Reference

pytestmark = pytest.mark.engine
TOKENS = 24
Start = Callable[[str], EngineProcess]

EVERYWHERE = {"name": SPIDERS, "at": "all"}
READ_CASES: dict[str, dict[str, Any] | None] = {
    "nothing": None,
    "the answer": {"read": [{"name": SPIDERS}]},
    "one layer, everywhere": {"read": [EVERYWHERE | {"layers": [1]}]},
    "three probes": {
        "read": [EVERYWHERE, {"name": GLOOMY, "at": "prompt"}, {"name": HEIGHTS, "layers": [2, 3]}]
    },
    "layers apart and their mean": {
        "read": [
            EVERYWHERE | {"layers": [1]},
            EVERYWHERE | {"layers": [3]},
            EVERYWHERE | {"layers": [1, 3]},
        ]
    },
    "ranges": {"read": [{"name": CHEERFUL, "at": [[2, 5], [-3, -1], [40, 44]]}]},
    "steering alone": {"directions": [{"name": CHEERFUL, "scale": 8.0}]},
    "what is steered, before and after": {
        "directions": [{"name": SPIDERS, "scale": 10.0}],
        "read": [EVERYWHERE, EVERYWHERE | {"when": "after"}, {"name": HEIGHTS, "at": "all"}],
    },
    "what is steered for a while": {
        "directions": [{"name": GLOOMY, "scale": 9.0, "positions": {"generated": [2, 9]}}],
        "read": [{"name": GLOOMY, "when": "after"}, {"name": GLOOMY}],
    },
}
AFFINE_CASES: dict[str, dict[str, Any] | None] = {
    "ablation": {
        "directions": [{"name": SPIDERS, "op": "ablate"}],
        "read": [EVERYWHERE, EVERYWHERE | {"when": "after"}],
    },
    "what keeps its length": {
        "directions": [{"name": HEIGHTS, "scale": 14.0, "restore_norm": True}],
        "read": [{"name": HEIGHTS, "at": "all", "when": "after"}],
    },
    "gate": {
        "directions": [
            {"name": SPIDERS, "scale": 9.0, "gate": {"direction": HEIGHTS, "above": 0.0}}
        ],
        "read": [{"name": HEIGHTS, "at": "all"}, EVERYWHERE | {"when": "after"}],
    },
}


def assert_scores_equal_hooks(
    reference: Reference,
    prompts: Sequence[Sequence[int]],
    steerings: Sequence[dict[str, Any] | None],
    outputs: Sequence[Output],
    cached: bool = False,
) -> None:
    """Every score equals the hooks', and there are none but those that were asked for."""
    for prompt, steering, output in zip(prompts, steerings, outputs, strict=True):
        if not steering or "read" not in steering:
            assert output.scores is None
            continue
        expected = reference.read(prompt, output.tokens, steering)
        # The last token went through no model.
        expected[:, -1] = np.nan
        if cached:
            expected[:, : output.cached] = np.nan
        assert output.scores is not None
        assert np.array_equal(np.isnan(output.scores), np.isnan(expected)), steering
        assert np.nanmax(np.abs(output.scores - expected), initial=0.0) < TOLERANCE, steering


@pytest.mark.parametrize("kind", ["reads-eager", "reads-compiled", "reads-v2-eager"])
def test_equals_hooks(
    kind: str, start: Start, prompts: list[list[int]], reference: Reference
) -> None:
    steerings = list(READ_CASES.values())
    prompts = prompts[: len(steerings)]
    outputs = start(kind).generate(prompts, steerings, TOKENS)
    assert_equals_hooks(reference, prompts, steerings, outputs, TOKENS)
    assert_scores_equal_hooks(reference, prompts, steerings, outputs)
