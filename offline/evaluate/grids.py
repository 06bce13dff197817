"""Graded answers of a class: every concept at every scale on every question, with floor and ceiling."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from vllm_steer.offline.measures.fluency import Fluency, Margins, joint

Doubles = NDArray[np.float64]
Flags = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Answers:
    """Graded answers, each array ``[concepts, questions]``, float64.

    Attributes:
        grades: 0 to 1; NaN where the judge failed.
        perplexity: Under the unsteered model; NaN for an empty answer.
        repetition: Share of repeated word pairs.
        raised: By how much the steering raises the log-likelihood of the prefixed model's answer after
            the plain prompt; NaN where no prefix is known.
        gap: By how much the prefix raises it; likewise.
    """

    grades: Doubles
    perplexity: Doubles
    repetition: Doubles
    raised: Doubles
    gap: Doubles

    def some(self, concepts: slice | Flags, questions: slice) -> Answers:
        """Returns the answers of some concepts to some questions."""
        return Answers(*(values[concepts, questions] for values in self.arrays()))

    def arrays(self) -> list[Doubles]:
        """Returns the arrays, in the order of the attributes."""
        return [getattr(self, field.name) for field in fields(self)]

    def fluency(self) -> list[Fluency]:
        """Returns the fluency of each concept's answers."""
        perplexity = np.exp(mean(np.log(self.perplexity), axis=1)).tolist()
        parts = zip(mean(self.repetition, axis=1).tolist(), perplexity, strict=True)
        return [Fluency(*part) for part in parts]


@dataclass(frozen=True, eq=False)
class Grid:
    """Every concept of a class at every scale on every question.

    Attributes:
        concepts: Names of the concepts.
        scales: Scales, from the weakest to the strongest.
        answers: One entry per scale.
        unsteered: The floor.
        prefixed: The ceiling; NaN throughout for concepts whose prefix is unknown.
    """

    concepts: tuple[str, ...]
    scales: tuple[float, ...]
    answers: tuple[Answers, ...]
    unsteered: Answers
    prefixed: Answers

    def questions(self, chosen: slice) -> Grid:
        """Returns the grid of some of the questions."""
        return Grid(
            self.concepts,
            self.scales,
            tuple(answers.some(slice(None), chosen) for answers in self.answers),
            self.unsteered.some(slice(None), chosen),
            self.prefixed.some(slice(None), chosen),
        )

    @cached_property
    def grades(self) -> Doubles:
        """``[scales, concepts, questions]``."""
        return np.stack([answers.grades for answers in self.answers])

    @cached_property
    def known(self) -> Flags:
        """``[concepts]``: whether the concept's prefix is known."""
        return np.array(~np.isnan(self.prefixed.repetition).all(axis=1), dtype=np.bool_)

    @cached_property
    def bounds(self) -> list[Fluency]:
        """The bound of fluent text for each concept, from answers to the same questions."""
        prefixed, unsteered = self.prefixed.fluency(), self.unsteered.fluency()
        return [
            Margins().bound(own if known else None, plain)
            for own, plain, known in zip(prefixed, unsteered, self.known, strict=True)
        ]

    @cached_property
    def fluent(self) -> Flags:
        """``[scales, concepts]``: whether a concept's answers at a scale are fluent."""
        rows = [
            [found.within(bound) for found, bound in zip(a.fluency(), self.bounds, strict=True)]
            for a in self.answers
        ]
        return np.array(rows, dtype=np.bool_)

    @cached_property
    def jointly_fluent(self) -> Flags:
        """``[scales]``: whether the answers of all concepts together are fluent."""
        bound = joint(self.bounds)
        rows = [joint(answers.fluency()).within(bound) for answers in self.answers]
        return np.array(rows, dtype=np.bool_)

    def pick(self, scale: NDArray[np.int64]) -> Answers:
        """Returns answers by the index of their scale, which broadcasts to [concepts, questions]."""
        index = np.broadcast_to(scale, self.answers[0].grades.shape)[None]

        def taken(values: Sequence[Doubles]) -> Doubles:
            return np.take_along_axis(np.stack(values), index, axis=0)[0]

        by_array = zip(*(answers.arrays() for answers in self.answers), strict=True)
        return Answers(*map(taken, by_array))


@dataclass(frozen=True, eq=False)
class Gaps:
    """The gaps of a class's concepts and the parts closed by steering; NaN if the prefix is unknown.

    Attributes:
        gap: ``[concepts, questions]``, float64; by how much the prefix raises the log-likelihood of the
            prefixed model's answer after the plain prompt.
        raised: ``[scales, concepts, questions]``, float64; by how much steering does.
    """

    gap: Doubles
    raised: Doubles


def mean(values: Doubles, axis: int) -> Doubles:
    """Mean of the values that are not NaN; NaN if there are none."""
    masked = np.ma.masked_invalid(values).mean(axis=axis)
    return np.asarray(np.ma.filled(masked, np.nan), dtype=np.float64)
