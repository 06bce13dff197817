"""The preset ``loreft``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from vllm_steer.offline.train.directions import Direction, low_rank_directions
from vllm_steer.offline.train.examples import Answered
from vllm_steer.offline.train.forms import LowRank
from vllm_steer.offline.train.objectives.likelihood import Likelihood
from vllm_steer.offline.train.presets.preset import Bench, Preset
from vllm_steer.offline.train.trainer import Result


class LoReFTPreset(Preset[Answered]):
    """LoReFT, arXiv 2404.03592: h + Rᵀ(W·h + b − R·h) at some blocks, at the prompt's first and last tokens.

    As in the paper and its authors' code: rows of R are orthonormal, nothing is shared between blocks, rank 4, the first 5
    and the last 5 tokens, AdamW with steps of 9e-4 on a straight line to 0.
    It departs in these: the same R, W and b act at first and last tokens (the paper's tied form); blocks are four, spread
    evenly, where the paper tunes them; there is no dropout, no weight decay and no warm-up; R begins as a random
    orthonormal basis of the QR decomposition; all is float32; what is kept is the best on held-out examples.
    """

    paper: ClassVar[str] = "2404.03592"
    example: ClassVar[type[Any]] = Answered
    defaults: ClassVar[Mapping[str, Any]] = {
        "rate": 9e-4,
        "schedule": "linear",
        "examples": 8,
        "epochs": 12,
        "positions": "f5+l5",
    }
    takes: ClassVar[frozenset[str]] = frozenset({"rank"})

    def objective(self, bench: Bench) -> Likelihood:
        settings = bench.settings
        form = LowRank((1, len(bench.norms)), bench.hidden_size, settings.rank, settings.seed)
        return Likelihood(bench.answers, form, bench.positions)

    def directions(
        self, name: str, objective: Likelihood, result: Result, examples: Sequence[Answered]
    ) -> list[Direction]:
        found = {key: value.cpu().numpy() for key, value in result.learned.items()}
        return low_rank_directions(name, objective.answers.layers, **found)

    def layers(self, blocks: int) -> list[int]:
        return sorted({blocks * k // 5 for k in range(1, 5)})
