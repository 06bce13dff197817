"""The search for scales: which are tried on which question, and which of them do best.

What the method writes as alpha (x + gamma (h - mu)) + (1 - alpha) x is x + alpha gamma (h - mu), so one
number counts for each segment of layers: the product of two that are drawn evenly. The method's own
search is five trials of Optuna's TPE, which draws its first ten at random; here all are, so that what
each trial adds can be measured before an engine is started.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from vllm_steer.errors import EvaluationError
from vllm_steer.offline.evaluate.generation import Answer, Request
from vllm_steer.offline.fusion.objective import objective

Kind = Literal["full", "segmented"]
Segments = tuple[tuple[int, ...], ...]
SEGMENTS = 3


@dataclass(frozen=True)
class Budget:
    """How a search goes.

    Attributes:
        trials: Trials of each study.
        low: Least value of alpha and of gamma.
        high: Largest value of either.
        seed: Seed of the draws; each study's differs.
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

    def draw(self, count: int, study: int) -> list[tuple[float, ...]]:
        """Returns ``count`` scales for each trial of a study, each the product of an alpha and a gamma."""
        drawn = np.random.default_rng([self.seed, study]).uniform(
            self.low, self.high, (2, self.trials, count)
        )
        return [tuple(row) for row in drawn.prod(axis=0).tolist()]


@dataclass(frozen=True)
class Case:
    """A question steered by the scales of one trial.

    Attributes:
        question: Place of the question among all.
        kind: Which layers share a scale.
        trial: Number of the trial.
        segments: Layers of each segment.
        scales: Scale of each segment.
        common: Whether the scales are tried on several questions together.
    """

    question: int
    kind: Kind
    trial: int
    segments: Segments
    scales: tuple[float, ...]
    common: bool = False

    @property
    def name(self) -> str:
        """Name of its direction."""
        return f"q{self.question} {self.kind} {'common ' if self.common else ''}{self.trial}"

    @property
    def layer_scales(self) -> list[float]:
        """Scale of each layer."""
        return [
            scale for layers, scale in zip(self.segments, self.scales, strict=True) for _ in layers
        ]


@dataclass(frozen=True)
class FusionRequest(Request):
    """An answer steered along a case's direction.

    Attributes:
        case: The case.
    """

    case: Case | None = None


Ask = Callable[[Sequence[FusionRequest]], list[Answer]]
"""Answers requests, in their order."""


@dataclass(frozen=True)
class Target:
    """A question of a study, in one of its trials.

    Attributes:
        question: The user's text.
        gold: The gold answer.
        pack: Name of the pack that has the case's direction.
        case: What it is steered by.
    """

    question: str
    gold: str
    pack: str
    case: Case

    @property
    def request(self) -> FusionRequest:
        """The request for the answer; the direction's vectors include the scales."""
        return FusionRequest(
            self.question, f"{self.pack}/{self.case.name}", scale=1.0, case=self.case
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


def cases_of(
    questions: int, tuning: int, kinds: Sequence[Kind], layers: int, budget: Budget
) -> list[Case]:
    """Returns everything that a run tries.

    Args:
        questions: Number of reported questions, each with a separate search.
        tuning: Number of questions after them that share a study, whose scales the others are also
            asked with; may be 0.
        kinds: Which layers share a scale.
        layers: Layers of the model.
        budget: How many trials, and where.

    Raises:
        EvaluationError: There are fewer layers than segments.
    """
    cases = []
    for kind in kinds:
        segments = segments_of(kind, layers)
        # The last study is that of the tuning questions.
        for study in range(questions + bool(tuning)):
            common = study == questions
            places = range(questions + tuning) if common else (study,)
            cases += [
                Case(place, kind, trial, segments, scales, common)
                for trial, scales in enumerate(budget.draw(len(segments), study))
                for place in places
            ]
    return cases


def best(trials: Sequence[Trial]) -> Trial:
    """Returns the first of the trials with the highest value."""
    return max(trials, key=lambda trial: trial.value)


def search(ask: Ask, studies: Sequence[Sequence[Sequence[Target]]]) -> list[list[Trial]]:
    """Tries the scales of every study, all in one batch.

    Args:
        ask: Answers requests.
        studies: For each study and trial its questions, which share the trial's scales.

    Returns:
        The trials of each study, in their order.
    """
    every = [target for trials in studies for targets in trials for target in targets]
    answers = iter(ask([target.request for target in every]))
    return [[_trial(targets, answers) for targets in trials] for trials in studies]


def _trial(targets: Sequence[Target], answers: Iterator[Answer]) -> Trial:
    own = tuple(next(answers) for _ in targets)
    values = [objective(answer, t.gold) for answer, t in zip(own, targets, strict=True)]
    return Trial(targets[0].case.scales, own, float(np.mean(values)))
