"""Subjects of a sweep: the concepts of a class, their questions, and the measurements of their answers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product

import numpy as np

from vllm_steer.errors import EvaluationError, choices
from vllm_steer.offline.calibrate.grid import rounded
from vllm_steer.offline.evaluate.generation import Answer, Request
from vllm_steer.offline.evaluate.grids import Answers, Doubles, Gaps, Grid
from vllm_steer.offline.evaluate.judges import Case, Grade
from vllm_steer.offline.evaluate.scores import Measured, measure
from vllm_steer.offline.measures.fluency import repetition
from vllm_steer.offline.models.prompts import PREFIX_TEMPLATES
from vllm_steer.offline.questions.by_class import GENERAL, Question, QuestionSet
from vllm_steer.packs.pack import DirectionRecord, Prefix, SteeringPack

# Default grid around a pack's default scale.
_FACTORS = (0.5, 0.625, 0.75, 0.875, 1.0, 1.125, 1.25, 1.5)
# For calibrated directions: these, then steps up to the largest fluent scale, and one beyond.
_UP_TO_DEFAULT = (0.5, 0.75, 1.0)
_STEPS, _BEYOND = 4, 1.25


@dataclass(frozen=True, eq=False)
class Subject:
    """The concepts that share a class, a grid and questions.

    Attributes:
        name: Name of the class in the results.
        concept_class: Class for the judge.
        directions: Direction of each concept, as ``pack/direction``, by the concept's name.
        scales: Distinct nonzero scales to try.
        questions: The questions.
        layers: Layers to steer; None for the directions' default layers.
        prefixes: Prefixes that make the model take on a concept without steering; missing if unknown.
    """

    name: str
    concept_class: str
    directions: dict[str, str]
    scales: tuple[float, ...]
    questions: QuestionSet
    layers: tuple[int, ...] | None = None
    prefixes: Mapping[str, Prefix] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.directions:
            raise EvaluationError(f"{self.name}: no direction to sweep")
        scales = self.scales
        if not scales or 0.0 in scales or len(set(scales)) != len(scales):
            raise EvaluationError(
                f"{self.name}: scales {list(scales)} must be distinct and none of them 0"
            )
        object.__setattr__(self, "scales", tuple(sorted(scales, key=abs)))

    @property
    def asked(self) -> tuple[Question, ...]:
        """All questions, tuning questions first."""
        return self.questions.tuning + self.questions.heldout

    @property
    def known(self) -> list[str]:
        """Concepts whose prefix is known."""
        return [concept for concept in self.directions if concept in self.prefixes]

    def requests(self) -> list[Request]:
        """Unsteered answers, then scale by scale, concept by concept, then the prefixed ones."""
        unsteered = [Request(question.asked) for question in self.asked]
        cells = product(self.scales, self.directions.values(), self.asked)
        steered = [
            Request(question.asked, direction, scale, self.layers)
            for scale, direction, question in cells
        ]
        prefixed = [
            Request(question.asked, prefix=self.prefixes[concept])
            for concept, question in product(self.known, self.asked)
        ]
        return unsteered + steered + prefixed

    def prefixed(self, answers: Sequence[Answer]) -> list[list[Answer]]:
        """Returns the prefixed answers among those to all requests, for each known concept."""
        count = len(self.asked)
        first = len(answers) - count * len(self.known)
        return [list(answers[at : at + count]) for at in range(first, len(answers), count)]

    def cases(self, answers: Sequence[Answer]) -> Iterator[Case]:
        """Cases to judge; an unsteered answer is judged for every concept."""
        for concepts, row in zip(self._concepts(), self._rows(answers), strict=True):
            parts = zip(product(concepts, self.asked), row, strict=True)
            for (concept, question), answer in parts:
                yield Case(self.concept_class, concept, question, answer.text, answer.finished)

    def measured(
        self, answers: Sequence[Answer], grades: Sequence[Grade], gaps: Gaps | None = None
    ) -> Measured:
        """Returns the class measured.

        Args:
            answers: Answers to :meth:`requests`.
            grades: Grades of :meth:`cases`.
            gaps: Gaps of the known concepts; None if shares of them are not wanted.

        Raises:
            EvaluationError: Nothing was graded.
        """
        rows = self._graded(answers, iter(grades))
        unknown = np.full(rows[0][0].shape, np.nan)
        gap = unknown if gaps is None else gaps.gap
        raised = [unknown] * len(self.scales) if gaps is None else [*gaps.raised]
        floor, *steered, ceiling = (
            Answers(*row, up, gap) for row, up in zip(rows, [0 * gap, *raised, gap], strict=True)
        )
        grid = Grid(tuple(self.directions), self.scales, tuple(steered), floor, ceiling)
        tuning, heldout = slice(len(self.questions.tuning)), slice(len(self.questions.tuning), None)
        try:
            return measure(grid.questions(tuning), grid.questions(heldout))
        except EvaluationError as error:
            first = next((grade.error for grade in grades if grade.error), "")
            raise EvaluationError(f"{self.name}: {error}; the first error: {first}") from error

    def _graded(
        self, answers: Sequence[Answer], grades: Iterator[Grade]
    ) -> list[tuple[Doubles, Doubles, Doubles]]:
        """Grades, perplexities and repetition of every row, ``[concepts, questions]`` each."""
        return [
            (
                self._spread(concepts, [next(grades).value for _ in row]),
                self._spread(concepts, [answer.perplexity for answer in row]),
                self._spread(concepts, [repetition(answer.text) for answer in row]),
            )
            for concepts, row in zip(self._concepts(), self._rows(answers), strict=True)
        ]

    def _spread(self, concepts: Sequence[str], values: Sequence[float | None]) -> Doubles:
        """``[concepts, questions]`` of values of some concepts; NaN for the others and for None."""
        names, count = list(self.directions), len(self.asked)
        found = np.full((len(names), count), np.nan)
        places = [names.index(concept) for concept in concepts]
        found[places] = np.array(values, dtype=np.float64).reshape(len(places), count)
        return found

    def _concepts(self) -> list[list[str]]:
        """The concepts of every row of :meth:`_rows`."""
        return [[*self.directions]] * (1 + len(self.scales)) + [self.known]

    def _rows(self, answers: Sequence[Answer]) -> Iterator[list[Answer]]:
        """Answers of the floor, of each scale and of the ceiling, concept by concept."""
        count, concepts = len(self.asked), len(self.directions)
        # The unsteered answers occur once, for all concepts.
        yield list(answers[:count]) * concepts
        for at in range(len(self.scales)):
            start = count * (1 + at * concepts)
            yield list(answers[start : start + count * concepts])
        yield [answer for part in self.prefixed(answers) for answer in part]


@dataclass(frozen=True)
class Selection:
    """The part of a pack to sweep.

    Attributes:
        concept_class: Its class; None for the pack's name if that is a class.
        scales: Scales; None for a grid around the median of the directions' default scales, where they
            are calibrated a little beyond the largest at which the text of any is fluent.
        concepts: Directions; None for all.
        layers: Layers to steer; None for the directions' default layers.
    """

    concept_class: str | None = None
    scales: Sequence[float] | None = None
    concepts: Sequence[str] | None = None
    layers: Sequence[int] | None = None


_EVERYTHING = Selection()


def subject_of(
    pack: SteeringPack,
    questions: QuestionSet,
    selection: Selection = _EVERYTHING,
    prefixes: Mapping[str, Prefix] | None = None,
) -> Subject:
    """Returns a pack as a subject.

    Args:
        pack: The pack.
        questions: The questions.
        selection: The part of the pack to sweep.
        prefixes: Prefixes that make the model take on each concept, by direction; the pack's if None or
            missing.

    Raises:
        EvaluationError: A direction does not exist or the scales are unusable.
    """
    chosen, layers = selection.concepts, selection.layers
    names = list(pack.directions) if chosen is None else list(dict.fromkeys(chosen))
    for name in names:
        if name not in pack.directions:
            raise EvaluationError(
                f"pack {pack.name!r} has no direction {name!r}; {choices(name, pack.directions)}"
            )
    records = [pack.directions[name] for name in names]
    given = {record.name: record.prefix for record in records} | dict(prefixes or {})
    return Subject(
        pack.name,
        selection.concept_class or class_of(pack),
        {name: f"{pack.name}/{name}" for name in names},
        tuple(default_scales(records) if selection.scales is None else selection.scales),
        questions,
        None if layers is None else tuple(layers),
        {name: prefix for name in names if (prefix := given[name]) is not None},
    )


def default_scales(records: Sequence[DirectionRecord]) -> list[float]:
    """Returns the default scales to try for directions."""
    middle = float(np.median([record.default_scale for record in records]))
    safe = [record.safe_scale for record in records if record.safe_scale is not None]
    if not safe or not middle or any(record.calibration is None for record in records):
        return [factor * middle for factor in _FACTORS]
    top = max(*safe, abs(middle)) / abs(middle)
    factors = [*_UP_TO_DEFAULT, *np.geomspace(1.0, top, _STEPS), _BEYOND * top]
    return list(dict.fromkeys(rounded(float(factor) * middle) for factor in factors))


def class_of(pack: SteeringPack) -> str:
    """Returns the class named by a pack's name, or the general one."""
    return pack.name if pack.name in PREFIX_TEMPLATES else GENERAL
