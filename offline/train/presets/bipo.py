"""The preset ``bipo``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch

from vllm_steer.offline.train.directions import Direction
from vllm_steer.offline.train.examples import Preference
from vllm_steer.offline.train.forms import Vectors
from vllm_steer.offline.train.objectives.preference import BidirectionalPreference
from vllm_steer.offline.train.presets.preset import Bench, Preset
from vllm_steer.offline.train.trainer import Result


class BiPOPreset(Preset[Preference]):
    """Bi-directional preference optimisation, arXiv 2406.00045: a vector that is added or subtracted.

    As in the paper and its authors' code: zero at the start, added at every position of one block, a direction of 1 or
    −1 drawn for each step, β = 0.1, AdamW with weight decay, steps of 4 pairs on a cosine after a warm-up, 20 epochs.
    It departs in these: steps are relative to the residual stream's length (the authors' 5e-4 is for one model), the
    warm-up is a tenth of all steps and not 100, and what is kept is the best on held-out pairs.
    """

    paper: ClassVar[str] = "2406.00045"
    example: ClassVar[type[Any]] = Preference
    defaults: ClassVar[Mapping[str, Any]] = {
        "rate": 0.005,
        "schedule": "cosine",
        "warmup": 0.1,
        "decay": 0.05,
        "examples": 4,
        "epochs": 20,
    }
    takes: ClassVar[frozenset[str]] = frozenset({"beta"})

    def objective(self, bench: Bench) -> BidirectionalPreference:
        start = torch.zeros(1, len(bench.norms), bench.hidden_size)
        settings = bench.settings
        return BidirectionalPreference(
            bench.answers,
            Vectors(start, bench.norms[None]),
            bench.positions,
            settings.beta,
            settings.seed,
        )

    def directions(
        self,
        name: str,
        objective: BidirectionalPreference,
        result: Result,
        examples: Sequence[Preference],
    ) -> list[Direction]:
        return [Direction(name, objective.answers.layers, result.learned["vectors"].cpu().numpy())]
