"""The preset ``prosv``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch

from vllm_steer.offline.train.directions import Direction
from vllm_steer.offline.train.examples import Answered
from vllm_steer.offline.train.forms import ScaledVectors
from vllm_steer.offline.train.objectives.likelihood import Likelihood
from vllm_steer.offline.train.presets.preset import Bench, Preset
from vllm_steer.offline.train.trainer import Result


class PrOSVPreset(Preset[Answered]):
    """Prompt-only steering vectors, arXiv 2605.05983: a direction and its factor, at the prompt's ends alone.

    As in the paper and its authors' code: f·v is added at the first 2 and the last 2 tokens of the prompt; v begins uniform
    at random, f and v are trained together by the likelihood of answers, with Adam and steps of their own on a straight
    line to 0. Steps are those of the code over what the parameters begin at: 0.24 for v, 0.052 for f.
    It departs in these: f·v begins as long as the residual stream, whatever the model, where the authors choose sizes for
    each model; gradients are not shortened; what is kept is the best on held-out examples.
    """

    paper: ClassVar[str] = "2605.05983"
    example: ClassVar[type[Any]] = Answered
    defaults: ClassVar[Mapping[str, Any]] = {
        "rate": 0.24,
        "schedule": "linear",
        "examples": 12,
        "epochs": 12,
        "positions": "f2+l2",
    }
    takes: ClassVar[frozenset[str]] = frozenset({"factor_rate", "start"})

    def objective(self, bench: Bench) -> Likelihood:
        settings = bench.settings
        generator = torch.Generator().manual_seed(settings.seed)
        shape = (1, len(bench.norms), bench.hidden_size)
        directions = 2 * torch.rand(*shape, generator=generator) - 1
        # A uniform coordinate has the root of a third of its bound.
        unit = settings.start * bench.norms[None] * (3 / bench.hidden_size) ** 0.5
        form = ScaledVectors(directions, unit, settings.factor_rate)
        return Likelihood(bench.answers, form, bench.positions)

    def directions(
        self, name: str, objective: Likelihood, result: Result, examples: Sequence[Answered]
    ) -> list[Direction]:
        metrics = {"factor_change": result.learned["factors"].tolist()}
        vectors = result.learned["vectors"].cpu().numpy()
        return [Direction(name, objective.answers.layers, vectors, metrics=metrics)]
