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

from offline.fluency import joint
from offline.grids import Answers, Doubles, Flags, Grid, mean
from offline.results import Bound, ClassResult, ConceptResult, Figures, Point
from offline.shares import CONFIDENCE, closed, closed_interval
from vllm_steer.errors import EvaluationError

RESAMPLES = 9999
NEAR = 0.01
# Nats below which a gap is none, and no share of it is told.
LEAST_GAP = 1.0
_WORD = re.compile(r"\w+")


@dataclass(frozen=True, eq=False)
class Measured:
    """A class's grids, and what was chosen on tuning questions.

    Attributes:
        tuning: What scales are chosen on.
        heldout: What is reported.
        scale: Index of the one scale.
        fluent: Whether the answers of all concepts at it are fluent.
        own: ``[concepts]``; index of each concept's own scale.
        own_fluent: ``[concepts]``; whether its answers at it are.
    """

    tuning: Grid
    heldout: Grid
    scale: int
    fluent: bool
    own: NDArray[np.int64]
    own_fluent: Flags

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

    @property
    def prefixed(self) -> Answers:
        """Held-out answers of the prefixed model, of concepts whose prefix is known alone."""
        return self.heldout.prefixed.some(self.heldout.known, slice(None))


def repetition(text: str) -> float:
    """Returns the share of word pairs that the text has used before; perplexity misses loops."""
    words = _WORD.findall(text.lower())
    pairs = list(zip(words, words[1:], strict=False))
    return 1 - len(set(pairs)) / len(pairs) if pairs else 0.0


def measure(tuning: Grid, heldout: Grid) -> Measured:
    """Chooses the scale of a class, and of each concept, on tuning questions alone.

    Scales whose answers are not fluent are not chosen; where none is, the weakest is. Of the others
    within ``NEAR`` of the best mean grade, the middle one is taken: at the ends of such a range a few
    other questions already change the outcome.

    Raises:
        EvaluationError: No answer to a tuning question, or to a held-out one, was graded.
    """
    for grid, name in ((tuning, "tuning"), (heldout, "held-out")):
        if np.isnan(grid.grades).all():
            raise EvaluationError(
                f"the judge graded none of the {grid.grades.size} answers to {name} questions"
            )
    by_concept = mean(tuning.grades, axis=2)
    by_scale = mean(tuning.grades.reshape(len(tuning.scales), -1), axis=1)
    fluent, jointly = tuning.fluent, tuning.jointly_fluent
    own = [_best(grades, flags) for grades, flags in zip(by_concept.T, fluent.T, strict=True)]
    return Measured(
        tuning,
        heldout,
        _best(by_scale, jointly),
        bool(jointly.any()),
        np.array(own),
        np.array(fluent.any(axis=0), dtype=np.bool_),
    )


def class_result(name: str, found: Measured, seed: int) -> ClassResult:
    """Returns the figures of one class."""
    grid = found.heldout
    bound = joint(found.tuning.bounds)
    return ClassResult(
        name=name,
        scale=grid.scales[found.scale],
        fluent=found.fluent,
        bound=Bound(
            repetition=bound.repetition,
            perplexity=_optional(bound.perplexity),
            prefixed=int(found.tuning.known.sum()),
        ),
        concepts=[_concept(found, at, seed) for at in range(len(grid.concepts))],
        single=figures([found.single], seed),
        own=figures([found.at_own], seed),
        oracle=figures([found.oracle], seed),
        unsteered=figures([grid.unsteered], seed),
        prefixed=_ceiling([found.prefixed], seed),
        tuning=_points(found.tuning, found.tuning.jointly_fluent, slice(None), seed),
        heldout=_points(grid, grid.jointly_fluent, slice(None), seed),
    )


def joint_result(name: str, classes: Sequence[Measured], seed: int) -> ClassResult:
    """Returns the figures of several classes together, each at its own chosen scale."""
    parts = [class_result(name, found, seed) for found in classes]
    return ClassResult(
        name=name,
        scale=None,
        fluent=None,
        bound=None,
        concepts=[concept for part in parts for concept in part.concepts],
        single=figures([found.single for found in classes], seed),
        own=figures([found.at_own for found in classes], seed),
        oracle=figures([found.oracle for found in classes], seed),
        unsteered=figures([found.heldout.unsteered for found in classes], seed),
        prefixed=_ceiling([found.prefixed for found in classes], seed),
        tuning=[],
        heldout=[],
    )


def figures(parts: Sequence[Answers], seed: int) -> Figures:
    """Returns the figures of answers, of one class or of several together."""
    by_concept = np.concatenate([mean(part.grades, axis=1) for part in parts])
    graded = by_concept[~np.isnan(by_concept)]
    low, high = interval(graded, seed)
    log_perplexity = np.concatenate([np.log(part.perplexity).ravel() for part in parts])
    perplexity = float(np.exp(mean(log_perplexity[None], axis=1)[0]))
    gap_closed, gap_low, gap_high = _gap_closed(parts, seed)
    return Figures(
        steerability=float(graded.mean()) if len(graded) else None,
        low=low,
        high=high,
        gap_closed=gap_closed,
        gap_low=gap_low,
        gap_high=gap_high,
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


def _gap_closed(
    parts: Sequence[Answers], seed: int
) -> tuple[float | None, float | None, float | None]:
    """Returns the mean over concepts of the share of the gap closed, and the ends of its interval."""
    rows = [
        (raised, gap)
        for part in parts
        for raised, gap in zip(part.raised, part.gap, strict=True)
        if gap.sum() >= LEAST_GAP
    ]
    if not rows:
        return None, None, None
    if len(rows) == 1:
        ends = closed_interval(*rows[0], seed)
        return closed(*rows[0]), *(ends or (None, None))
    shares = np.array([closed(*row) for row in rows])
    return float(shares.mean()), *interval(shares, seed)


def _concept(found: Measured, at: int, seed: int) -> ConceptResult:
    own = int(found.own[at])
    grid, one = found.heldout, slice(at, at + 1)

    def of(answers: Answers) -> Figures:
        return figures([answers.some(one, slice(None))], seed)

    return ConceptResult(
        name=grid.concepts[at],
        scale=grid.scales[own],
        fluent=bool(found.own_fluent[at]),
        single=of(found.single),
        own=of(grid.answers[own]),
        unsteered=of(grid.unsteered),
        prefixed=of(grid.prefixed) if grid.known[at] else None,
        tuning=_points(found.tuning, found.tuning.fluent[:, at], one, seed),
        heldout=_points(grid, grid.fluent[:, at], one, seed),
    )


def _ceiling(parts: Sequence[Answers], seed: int) -> Figures | None:
    known = [part for part in parts if part.grades.size]
    return figures(known, seed) if known else None


def _best(grades: Doubles, fluent: Flags) -> int:
    """Returns the middle, the weaker of two, of the fluent scales whose grade is within NEAR of the best.

    Args:
        grades: ``[scales]``, float64; NaN where nothing was graded.
        fluent: ``[scales]``; where none is, the weakest scale is returned.
    """
    kept = np.flatnonzero(fluent)
    if not len(kept):
        return 0
    among = _worst_if_nan(grades[kept])
    best = kept[among >= among.max() - NEAR]
    return int(best[(len(best) - 1) // 2])


def _points(grid: Grid, fluent: Flags, concepts: slice, seed: int) -> list[Point]:
    return [
        Point(
            scale=scale,
            fluent=bool(flag),
            figures=figures([answers.some(concepts, slice(None))], seed),
        )
        for scale, answers, flag in zip(grid.scales, grid.answers, fluent, strict=True)
    ]


def _worst_if_nan(values: Doubles) -> Doubles:
    return np.where(np.isnan(values), -np.inf, values)


def _optional(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
