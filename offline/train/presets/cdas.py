"""The preset ``cdas``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch

from vllm_steer.offline.train.directions import Direction
from vllm_steer.offline.train.examples import Contrast
from vllm_steer.offline.train.forms import UnitVectors
from vllm_steer.offline.train.objectives.distribution import DistributionMatching
from vllm_steer.offline.train.presets.preset import Bench, Preset
from vllm_steer.offline.train.trainer import Result
from vllm_steer.packs.pack import FormChoice


class CDASPreset(Preset[Contrast]):
    """Concept DAS, arXiv 2602.05234: one component, set to what it is after the prompt with the concept.

    As in the paper and its authors' code: the component along a vector of length 1, at the last token of one prompt, is put
    in the place of that at every token of the other prompt and its answer but the template's; the Jensen-Shannon
    divergence of the answer's distributions from those of the first prompt is taken both ways; the vector begins at random;
    AdamW with steps of 0.04 on a straight line to 0, gradients shortened to 1. What is served sets the component to its
    mean after the prompts with the concept; ``component_without`` is the mean after the others, which suppresses it.
    It departs in these: the answers to prompts without the concept are those of the file; what is kept is the best on
    held-out examples.
    """

    paper: ClassVar[str] = "2602.05234"
    example: ClassVar[type[Any]] = Contrast
    defaults: ClassVar[Mapping[str, Any]] = {
        "rate": 0.04,
        "schedule": "linear",
        "clip": 1.0,
        "examples": 8,
        "epochs": 18,
    }
    one_layer: ClassVar[bool] = True
    without_template: ClassVar[bool] = True

    def objective(self, bench: Bench) -> DistributionMatching:
        generator = torch.Generator().manual_seed(bench.settings.seed)
        start = torch.randn(1, 1, bench.hidden_size, generator=generator)
        form = UnitVectors(start, tangent=False)
        return DistributionMatching(bench.answers, form, bench.positions)

    def directions(
        self,
        name: str,
        objective: DistributionMatching,
        result: Result,
        examples: Sequence[Contrast],
    ) -> list[Direction]:
        unit = result.learned["vectors"]
        components = objective.components(unit, examples)
        # To as many digits as float32 has for certain.
        present, absent = (float(f"{mean:.6g}") for mean in components.mean(dim=1).tolist())
        return [
            Direction(
                name,
                objective.answers.layers,
                unit.cpu().numpy(),
                FormChoice(op="clamp"),
                present,
                {"component_without": absent},
            )
        ]
