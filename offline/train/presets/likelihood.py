"""The preset ``likelihood``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch

from vllm_steer.offline.train.directions import Direction
from vllm_steer.offline.train.examples import Answered
from vllm_steer.offline.train.forms import Vectors
from vllm_steer.offline.train.objectives.likelihood import Likelihood
from vllm_steer.offline.train.presets.preset import Bench, Preset
from vllm_steer.offline.train.trainer import Result


class LikelihoodPreset(Preset[Answered]):
    """Vectors at the middle blocks, added everywhere, that make given answers likely.

    The project's own: what ``extract --method trained`` learns of the prefixed model's answers, from answers of a file.
    The vectors begin at zero, not at a difference of means. Steps are relative to the residual stream's length.
    """

    paper: ClassVar[str] = ""
    example: ClassVar[type[Any]] = Answered
    defaults: ClassVar[Mapping[str, Any]] = {
        "rate": 0.0075,
        "examples": 8,
        "epochs": 4,
        "patience": 2,
        "held_out": 0.2,
    }
    takes: ClassVar[frozenset[str]] = frozenset({"penalty"})

    def objective(self, bench: Bench) -> Likelihood:
        start = torch.zeros(1, len(bench.norms), bench.hidden_size)
        form = Vectors(start, bench.norms[None])
        return Likelihood(bench.answers, form, bench.positions, bench.settings.penalty)

    def directions(
        self, name: str, objective: Likelihood, result: Result, examples: Sequence[Answered]
    ) -> list[Direction]:
        return [Direction(name, objective.answers.layers, result.learned["vectors"].cpu().numpy())]

    def layers(self, blocks: int) -> list[int]:
        return list(range(blocks // 4, max(blocks * 3 // 4, blocks // 4 + 1)))
