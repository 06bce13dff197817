"""The preset ``reft_r1``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch

from vllm_steer.errors import ExtractionError
from vllm_steer.offline.train.directions import Direction
from vllm_steer.offline.train.examples import Answered
from vllm_steer.offline.train.forms import UnitVectors
from vllm_steer.offline.train.objectives.detection import DetectionSteering
from vllm_steer.offline.train.presets.preset import Bench, Preset
from vllm_steer.offline.train.trainer import Result


class ReFTr1Preset(Preset[Answered]):
    """ReFT-r1 of AxBench, arXiv 2501.17148: one vector of length 1 that detects a concept and steers to it.

    As in the paper and its authors' code: while it is trained, w times the mean of the 8 largest ReLU(w·h) of prompt and
    answer is added everywhere but at the template's tokens; λ = 0.005 on all other detections, rising from 0; w begins with
    equal coordinates; AdamW on a straight line to 0, gradients shortened to 1 and without their part along w. What is
    served is w times the largest detection, so that ε is the paper's factor α.
    It departs in these: the largest detection is that of the examples learned from; answers without the concept are
    learned from only as far as the file has them; w has length 1 after a step, and not before it; what is kept is the
    best on held-out examples.
    """

    paper: ClassVar[str] = "2501.17148"
    example: ClassVar[type[Any]] = Answered
    defaults: ClassVar[Mapping[str, Any]] = {
        "rate": 0.01,
        "schedule": "linear",
        "clip": 1.0,
        "examples": 6,
        "epochs": 3,
    }
    takes: ClassVar[frozenset[str]] = frozenset({"strongest", "sparsity"})
    one_layer: ClassVar[bool] = True
    without_template: ClassVar[bool] = True

    def objective(self, bench: Bench) -> DetectionSteering:
        settings = bench.settings
        form = UnitVectors(torch.ones(1, 1, bench.hidden_size), tangent=True)
        return DetectionSteering(
            bench.answers, form, bench.positions, settings.strongest, settings.sparsity
        )

    def directions(
        self, name: str, objective: DetectionSteering, result: Result, examples: Sequence[Answered]
    ) -> list[Direction]:
        unit = result.learned["vectors"]
        largest = objective.largest(unit, examples)
        if not largest:
            raise ExtractionError(
                f"{name!r}: what was trained detects nothing in its examples; train with another block or a larger rate"
            )
        vectors = (largest * unit).cpu().numpy()
        metrics = {"largest_detection": largest}
        return [Direction(name, objective.answers.layers, vectors, metrics=metrics)]
