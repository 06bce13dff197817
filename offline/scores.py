"""From graded answers to steerability: choosing a scale on some questions, reporting on others.

The answers of a concept to different questions are alike, so a bootstrap over answers would make
intervals too narrow: what is resampled are concepts, each with the mean of its answers.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import bootstrap

from offline.results import ClassResult, Figures, Point
from vllm_steer.errors import EvaluationError

Doubles = NDArray[np.float64]

CONFIDENCE = 0.95
RESAMPLES = 9999
NEAR = 0.01
_WORD = re.compile(r"\w+")


@dataclass(frozen=True, eq=False)
class Answers:
    """Graded answers, each array ``[concepts, questions]``, float64.

    Attributes:
        grades: 0 to 1; NaN where the judge failed.
        perplexity: Under the unsteered model; NaN for an empty answer.
        repetition: See :func:`repetition`.
    """

    grades: Doubles
    perplexity: Doubles
    repetition: Doubles


@dataclass(frozen=True, eq=False)
class Grid:
    """Every concept of a class at every scale on every question.

    Attributes:
        concepts: Names of the concepts.
        scales: Scales, from the weakest to the strongest.
        answers: One entry per scale.
    """

    concepts: tuple[str, ...]
    scales: tuple[float, ...]
    answers: tuple[Answers, ...]

    def questions(self, chosen: slice) -> Grid:
        """Returns the grid of some of the questions."""
        parts = (
            Answers(a.grades[:, chosen], a.perplexity[:, chosen], a.repetition[:, chosen])
            for a in self.answers
        )
        return Grid(self.concepts, self.scales, tuple(parts))

    @property
    def grades(self) -> Doubles:
        """``[scales, concepts, questions]``."""
        return np.stack([answers.grades for answers in self.answers])

    def pick(self, scale: NDArray[np.int64]) -> Answers:
        """Returns answers by the index of their scale, which broadcasts to [concepts, questions]."""
        index = np.broadcast_to(scale, self.answers[0].grades.shape)[None]

        def taken(values: Sequence[Doubles]) -> Doubles:
            return np.take_along_axis(np.stack(values), index, axis=0)[0]

        return Answers(
            taken([answers.grades for answers in self.answers]),
            taken([answers.perplexity for answers in self.answers]),
            taken([answers.repetition for answers in self.answers]),
        )


@dataclass(frozen=True, eq=False)
class Measured:
    """A class's grids, and what was chosen: the input of :func:`summarize` for all classes."""

    tuning: Grid
    heldout: Grid
    unsteered: Answers
    scale: int
    own: NDArray[np.int64]

    @property
    def single(self) -> Answers:
        """Held-out answers at the one scale."""
        return self.heldout.answers[self.scale]

    @property
    def at_own(self) -> Answers:
        """Held-out answers, each concept at its own scale."""
        return self.heldout.pick(self.own[:, None])

    @property
    def oracle(self) -> Answers:
        """Held-out answers, each at the first of the scales that is best for it."""
        return self.heldout.pick(_worst_if_nan(self.heldout.grades).argmax(axis=0))


def repetition(text: str) -> float:
    """Returns the share of word pairs that the text has used before; perplexity misses loops."""
    words = _WORD.findall(text.lower())
    pairs = list(zip(words, words[1:], strict=False))
    return 1 - len(set(pairs)) / len(pairs) if pairs else 0.0


def measure(tuning: Grid, heldout: Grid, unsteered: Answers) -> Measured:
    """Chooses the scale of a class, and of each concept, on tuning questions alone.

    Of the scales within ``NEAR`` of the best mean grade, the middle one is taken: at the ends of
    such a range a few other questions already change the outcome.

    Raises:
        EvaluationError: No answer to a tuning question, or to a held-out one, was graded.
    """
    for grid, name in ((tuning, "tuning"), (heldout, "held-out")):
        if np.isnan(grid.grades).all():
            raise EvaluationError(
                f"the judge graded none of the {grid.grades.size} answers to {name} questions"
            )
    by_concept = _mean(tuning.grades, axis=2)
    by_scale = _mean(tuning.grades.reshape(len(tuning.scales), -1), axis=1)
    own = np.array([_middle_of_best(grades) for grades in by_concept.T])
    return Measured(tuning, heldout, unsteered, _middle_of_best(by_scale), own)


def class_result(name: str, found: Measured, seed: int) -> ClassResult:
    """Returns the figures of one class."""
    by_concept = _mean(found.single.grades, axis=1)
    concepts = found.heldout.concepts
    return ClassResult(
        name=name,
        concepts=list(concepts),
        scale=found.heldout.scales[found.scale],
        concept_scales={
            concept: found.heldout.scales[index]
            for concept, index in zip(concepts, found.own, strict=True)
        },
        single=figures([found.single], seed),
        own=figures([found.at_own], seed),
        oracle=figures([found.oracle], seed),
        unsteered=figures([found.unsteered], seed),
        by_concept={
            concept: _optional(value) for concept, value in zip(concepts, by_concept, strict=True)
        },
        tuning=_points(found.tuning, seed),
        heldout=_points(found.heldout, seed),
    )


def joint_result(name: str, classes: Sequence[Measured], seed: int) -> ClassResult:
    """Returns the figures of several classes together, each at its own chosen scale."""
    parts = [class_result(name, found, seed) for found in classes]
    return ClassResult(
        name=name,
        concepts=[concept for part in parts for concept in part.concepts],
        scale=None,
        concept_scales={k: v for part in parts for k, v in part.concept_scales.items()},
        single=figures([found.single for found in classes], seed),
        own=figures([found.at_own for found in classes], seed),
        oracle=figures([found.oracle for found in classes], seed),
        unsteered=figures([found.unsteered for found in classes], seed),
        by_concept={k: v for part in parts for k, v in part.by_concept.items()},
        tuning=[],
        heldout=[],
    )


def figures(parts: Sequence[Answers], seed: int) -> Figures:
    """Returns the figures of answers, of one class or of several together."""
    by_concept = np.concatenate([_mean(part.grades, axis=1) for part in parts])
    graded = by_concept[~np.isnan(by_concept)]
    low, high = interval(graded, seed)
    log_perplexity = np.concatenate([np.log(part.perplexity).ravel() for part in parts])
    perplexity = float(np.exp(_mean(log_perplexity[None], axis=1)[0]))
    return Figures(
        steerability=float(graded.mean()) if len(graded) else None,
        low=low,
        high=high,
        perplexity=_optional(perplexity),
        repetition=float(np.concatenate([part.repetition.ravel() for part in parts]).mean()),
        answers=sum(part.grades.size for part in parts),
        judge_errors=sum(int(np.isnan(part.grades).sum()) for part in parts),
    )


def interval(by_concept: Doubles, seed: int) -> tuple[float | None, float | None]:
    """Returns the 95 % percentile bootstrap interval of a mean over concepts.

    Args:
        by_concept: ``[concepts]``, float64, finite. Where all are equal the interval has no width.
        seed: Seed of the resampling.

    Returns:
        Its ends; None for both with fewer than two concepts.
    """
    if len(by_concept) < 2:
        return None, None
    found = bootstrap(
        (by_concept,),
        np.mean,
        n_resamples=RESAMPLES,
        batch=1000,
        confidence_level=CONFIDENCE,
        method="percentile",
        random_state=np.random.default_rng(seed),
    ).confidence_interval
    return float(found.low), float(found.high)


def _middle_of_best(by_scale: Doubles) -> int:
    """Returns the middle, the weaker of two, of the scales whose grade is within NEAR of the best.

    Args:
        by_scale: ``[scales]``, float64; NaN where nothing was graded.
    """
    grades = _worst_if_nan(by_scale)
    best = np.flatnonzero(grades >= grades.max() - NEAR)
    return int(best[(len(best) - 1) // 2])


def _points(grid: Grid, seed: int) -> list[Point]:
    return [
        Point(scale=scale, figures=figures([answers], seed))
        for scale, answers in zip(grid.scales, grid.answers, strict=True)
    ]


def _mean(values: Doubles, axis: int) -> Doubles:
    """Mean of what is not NaN; NaN where nothing is left."""
    masked = np.ma.masked_invalid(values).mean(axis=axis)
    return np.asarray(np.ma.filled(masked, np.nan), dtype=np.float64)


def _worst_if_nan(values: Doubles) -> Doubles:
    return np.where(np.isnan(values), -np.inf, values)


def _optional(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
