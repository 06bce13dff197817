"""From graded answers to steerability: choosing a scale on some questions, reporting on others.

The answers of a concept to different questions are similar, so an interval over answers would be too narrow:
intervals are over concepts, each with the mean of its answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vllm_steer.errors import EvaluationError
from vllm_steer.offline.evaluate.grids import Answers, Doubles, Flags, Grid, mean
from vllm_steer.offline.evaluate.results import Bound, ClassResult, ConceptResult, Figures, Point
from vllm_steer.offline.measures.fluency import joint
from vllm_steer.offline.measures.intervals import SHARE, mean_interval, ratio_interval
from vllm_steer.offline.measures.shares import closed

NEAR = 0.01
# Nats below which a gap counts as none, without a share.
LEAST_GAP = 1.0


@dataclass(frozen=True, eq=False)
class Measured:
    """A class's grids, and the choices on tuning questions.

    Attributes:
        tuning: Grid for choosing scales.
        heldout: Grid to report.
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
        """Held-out answers of the prefixed model, only of concepts with a known prefix."""
        return self.heldout.prefixed.some(self.heldout.known, slice(None))


def measure(tuning: Grid, heldout: Grid) -> Measured:
    """Chooses the scale of a class, and of each concept, only on tuning questions.

    Scales whose answers are not fluent are not chosen; if none is fluent, the weakest is. Of the others
    within ``NEAR`` of the best mean grade, the middle one is chosen, since at the ends of such a range a few
    different questions change the outcome.

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


def class_result(name: str, found: Measured) -> ClassResult:
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
        concepts=[_concept(found, at) for at in range(len(grid.concepts))],
        single=figures([found.single]),
        own=figures([found.at_own]),
        oracle=figures([found.oracle]),
        unsteered=figures([grid.unsteered]),
        prefixed=_ceiling([found.prefixed]),
        tuning=_points(found.tuning, found.tuning.jointly_fluent, slice(None)),
        heldout=_points(grid, grid.jointly_fluent, slice(None)),
    )


def joint_result(name: str, classes: Sequence[Measured]) -> ClassResult:
    """Returns the figures of several classes together, each at its own chosen scale."""
    parts = [class_result(name, found) for found in classes]
    return ClassResult(
        name=name,
        scale=None,
        fluent=None,
        bound=None,
        concepts=[concept for part in parts for concept in part.concepts],
        single=figures([found.single for found in classes]),
        own=figures([found.at_own for found in classes]),
        oracle=figures([found.oracle for found in classes]),
        unsteered=figures([found.heldout.unsteered for found in classes]),
        prefixed=_ceiling([found.prefixed for found in classes]),
        tuning=[],
        heldout=[],
    )


def figures(parts: Sequence[Answers]) -> Figures:
    """Returns the figures of answers, of one class or of several together."""
    by_concept = np.concatenate([mean(part.grades, axis=1) for part in parts])
    graded = by_concept[~np.isnan(by_concept)]
    low, high = mean_interval(graded, SHARE)
    log_perplexity = np.concatenate([np.log(part.perplexity).ravel() for part in parts])
    perplexity = float(np.exp(mean(log_perplexity[None], axis=1)[0]))
    gap_closed, gap_low, gap_high = _gap_closed(parts)
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


def _gap_closed(parts: Sequence[Answers]) -> tuple[float | None, float | None, float | None]:
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
        ends = ratio_interval(*rows[0])
        return closed(*rows[0]), *(ends or (None, None))
    shares = np.array([closed(*row) for row in rows])
    return float(shares.mean()), *mean_interval(shares)


def _concept(found: Measured, at: int) -> ConceptResult:
    own = int(found.own[at])
    grid, one = found.heldout, slice(at, at + 1)

    def of(answers: Answers) -> Figures:
        return figures([answers.some(one, slice(None))])

    return ConceptResult(
        name=grid.concepts[at],
        scale=grid.scales[own],
        fluent=bool(found.own_fluent[at]),
        single=of(found.single),
        own=of(grid.answers[own]),
        unsteered=of(grid.unsteered),
        prefixed=of(grid.prefixed) if grid.known[at] else None,
        tuning=_points(found.tuning, found.tuning.fluent[:, at], one),
        heldout=_points(grid, grid.fluent[:, at], one),
    )


def _ceiling(parts: Sequence[Answers]) -> Figures | None:
    known = [part for part in parts if part.grades.size]
    return figures(known) if known else None


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


def _points(grid: Grid, fluent: Flags, concepts: slice) -> list[Point]:
    return [
        Point(
            scale=scale,
            fluent=bool(flag),
            figures=figures([answers.some(concepts, slice(None))]),
        )
        for scale, answers, flag in zip(grid.scales, grid.answers, fluent, strict=True)
    ]


def _worst_if_nan(values: Doubles) -> Doubles:
    return np.where(np.isnan(values), -np.inf, values)


def _optional(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
