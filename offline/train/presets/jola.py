"""The preset ``jola``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from vllm_steer.offline.train.directions import Direction, scaled_directions
from vllm_steer.offline.train.examples import Answered
from vllm_steer.offline.train.forms import ScaledDimensions
from vllm_steer.offline.train.objectives.likelihood import Likelihood
from vllm_steer.offline.train.presets.preset import Bench, Preset
from vllm_steer.offline.train.trainer import Result


class JoLAPreset(Preset[Answered]):
    """Joint localization and activation editing, arXiv 2502.01179: dimensions are scaled and moved, h ⊙ (1 + m) + a.

    As in the paper and its authors' code: m and a are trained together by the likelihood of answers, at every position,
    from no change, by steps of 0.005 of 8 examples on a cosine after a warm-up, up to 20 epochs.
    It departs in these: it edits the outputs of blocks, where the authors edit those of attention heads; no gates choose
    among them, blocks are the middle ones or those asked for; steps of a are relative to the residual stream's length;
    the warm-up is a tenth of all steps, not 50 steps; what is kept is the best on held-out examples.
    """

    paper: ClassVar[str] = "2502.01179"
    example: ClassVar[type[Any]] = Answered
    defaults: ClassVar[Mapping[str, Any]] = {
        "rate": 0.005,
        "schedule": "cosine",
        "warmup": 0.1,
        "examples": 8,
        "epochs": 20,
    }

    def objective(self, bench: Bench) -> Likelihood:
        form = ScaledDimensions(bench.norms[None], bench.hidden_size)
        return Likelihood(bench.answers, form, bench.positions)

    def directions(
        self, name: str, objective: Likelihood, result: Result, examples: Sequence[Answered]
    ) -> list[Direction]:
        found = {key: value.cpu().numpy() for key, value in result.learned.items()}
        return scaled_directions(name, objective.answers.layers, **found)

    def layers(self, blocks: int) -> list[int]:
        return list(range(blocks // 4, max(blocks * 3 // 4, blocks // 4 + 1)))
