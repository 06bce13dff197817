"""The factor of the optimiser's step over the steps of a training, as transformers' schedules have it."""

from __future__ import annotations

import math
from typing import Literal

Schedule = Literal["constant", "linear", "cosine"]


def factor(schedule: Schedule, step: int, steps: int, warmup: int) -> float:
    """Returns the factor of a step.

    Args:
        schedule: ``constant``; ``linear`` down to 0; ``cosine``, half a wave down to 0.
        step: Number of the step, from 0.
        steps: Steps of the whole training.
        warmup: First steps, in which the factor rises from 0.
    """
    if step < warmup:
        return step / warmup
    passed = (step - warmup) / max(1, steps - warmup)
    return {
        "constant": 1.0,
        "linear": 1.0 - passed,
        "cosine": 0.5 * (1.0 + math.cos(math.pi * passed)),
    }[schedule]
