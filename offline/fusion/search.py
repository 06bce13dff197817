"""The search for scales: one study per question, the current trials of all of them in one batch.

What the method writes as alpha (x + gamma (h - mu)) + (1 - alpha) x is x + alpha gamma (h - mu), so one
number is searched for each segment of layers: the product.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import optuna
from optuna.distributions import FloatDistribution
from tqdm import tqdm

from offline.fusion.objective import objective
from offline.generation import Answer, Request
from vllm_steer.errors import EvaluationError

Kind = Literal["full", "segmented"]
Segments = tuple[tuple[int, ...], ...]
SEGMENTS = 3


@dataclass(frozen=True)
class FusionRequest(Request):
    """An answer steered along one direction with a scale for each segment of layers.

    Attributes:
        segments: Layers of each segment.
        scales: Scale of each segment.
    """

    segments: Segments = ()
    scales: tuple[float, ...] = ()

    def steering(self) -> dict[str, Any] | None:
        """Returns the request's steering as vllm-steer reads it."""
        return {
            "directions": [
                {"name": self.direction, "scale": scale, "layers": list(layers)}
                for layers, scale in zip(self.segments, self.scales, strict=True)
            ]
        }


Ask = Callable[[Sequence[FusionRequest]], list[Answer]]
"""Answers requests, in their order."""


@dataclass(frozen=True)
class Target:
    """A question of a study.

    Attributes:
        question: The user's text.
        gold: The gold answer.
        direction: ``pack/direction`` of its reference vector.
    """

    question: str
    gold: str
    direction: str

    def request(self, segments: Segments, scales: tuple[float, ...]) -> FusionRequest:
        """Returns the request for an answer with these scales."""
        return FusionRequest(self.question, self.direction, segments=segments, scales=scales)


@dataclass(frozen=True)
class Budget:
    """How a search goes.

    Attributes:
        trials: Trials of each study.
        low: Least scale.
        high: Largest scale.
        seed: Seed of the samplers; each study's differs.
    """

    trials: int
    low: float
    high: float
    seed: int

    def __post_init__(self) -> None:
        if self.trials < 1 or not self.low < self.high:
            raise EvaluationError(
                f"a search needs trials and a range of scales, not {self.trials} trials from "
                f"{self.low:g} to {self.high:g}"
            )


@dataclass(frozen=True)
class Trial:
    """One set of scales tried on a study's questions.

    Attributes:
        scales: Scale of each segment.
        answers: Answer to each question.
        value: Mean objective over them.
    """

    scales: tuple[float, ...]
    answers: tuple[Answer, ...]
    value: float


def segments_of(kind: Kind, layers: int) -> Segments:
    """Returns the segments of a model's layers: all in one, or early, middle and late thirds.

    Raises:
        EvaluationError: There are fewer layers than segments.
    """
    count = 1 if kind == "full" else SEGMENTS
    if layers < count:
        raise EvaluationError(f"{layers} layers cannot be cut into {count} segments")
    return tuple(tuple(part.tolist()) for part in np.array_split(np.arange(layers), count))


def best(trials: Sequence[Trial]) -> Trial:
    """Returns the first of the trials with the highest value."""
    return max(trials, key=lambda trial: trial.value)


def search(
    ask: Ask, studies: Sequence[Sequence[Target]], segments: Segments, budget: Budget
) -> list[list[Trial]]:
    """Searches scales for every study by Optuna's TPE, all studies trial by trial side by side.

    The first ten trials of TPE are drawn at random, which is all of them in the method's own budget
    of five.

    Args:
        ask: Answers the requests of one round: one per question of each study.
        studies: Questions of each study, which share its scales.
        segments: Layers of each scale.
        budget: How many trials, and where.

    Returns:
        The trials of each study, in their order.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    samplers = (optuna.samplers.TPESampler(seed=budget.seed + i) for i in range(len(studies)))
    made = [optuna.create_study(direction="maximize", sampler=sampler) for sampler in samplers]
    space = {
        f"segment {i}": FloatDistribution(budget.low, budget.high) for i in range(len(segments))
    }
    found: list[list[Trial]] = [[] for _ in studies]
    for _ in tqdm(range(budget.trials), desc="trials", unit="trial"):
        asked = [study.ask(dict(space)) for study in made]
        scales = [tuple(trial.params[name] for name in space) for trial in asked]
        requests = [
            target.request(segments, given)
            for targets, given in zip(studies, scales, strict=True)
            for target in targets
        ]
        answers = iter(ask(requests))
        for study, trial, targets, given, trials in zip(
            made, asked, studies, scales, found, strict=True
        ):
            own = tuple(next(answers) for _ in targets)
            values = [objective(a, t.gold) for a, t in zip(own, targets, strict=True)]
            study.tell(trial, float(np.mean(values)))
            trials.append(Trial(given, own, float(np.mean(values))))
    return found
