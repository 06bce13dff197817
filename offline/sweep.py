"""The sweep: every concept at every scale on every question, judged, and a scale chosen."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TypeVar

import numpy as np

from offline.generation import Answer, Generator, Request
from offline.judges import Case, Grade, Judge
from offline.prompts import PREFIX_TEMPLATES
from offline.questions import GENERAL, Question, QuestionSet
from offline.results import ClassResult, SweepResult
from offline.scores import (
    Answers,
    Grid,
    Measured,
    class_result,
    joint_result,
    measure,
    repetition,
)
from vllm_steer.errors import EvaluationError, choices
from vllm_steer.pack import SteeringPack

ALL = "all"
# A grid around the scale that a pack gives as its default, where no other is asked for.
_FACTORS = (0.5, 0.625, 0.75, 0.875, 1.0, 1.125, 1.25, 1.5)
_SHOWN_FAULTS = 5
T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Subject:
    """The concepts that share a class, a grid and questions.

    Attributes:
        name: What the class is called in the results.
        concept_class: Class that the judge goes by.
        directions: Direction of each concept, as ``pack/direction``, by the concept's name.
        scales: Scales to try, none of them 0 or given twice.
        questions: What is asked.
        layers: Layers to steer; None for all of the directions'.
    """

    name: str
    concept_class: str
    directions: dict[str, str]
    scales: tuple[float, ...]
    questions: QuestionSet
    layers: tuple[int, ...] | None = None

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

    def requests(self) -> list[Request]:
        """Unsteered answers to all questions, then scale by scale, concept by concept."""
        unsteered = [Request(question.asked) for question in self.asked]
        cells = product(self.scales, self.directions.values(), self.asked)
        return unsteered + [
            Request(question.asked, direction, scale, self.layers)
            for scale, direction, question in cells
        ]

    def cases(self, answers: Sequence[Answer]) -> Iterator[Case]:
        """What is judged of the answers: an unsteered one is judged for every concept."""
        count = len(self.asked)
        steered = iter(answers[count:])
        for scale in (0.0, *self.scales):
            for concept in self.directions:
                for index, question in enumerate(self.asked):
                    answer = next(steered) if scale else answers[index]
                    yield Case(self.concept_class, concept, question, answer.text, answer.finished)

    def measured(self, answers: Sequence[Answer], grades: Sequence[Grade]) -> Measured:
        """Returns the class measured; ``grades`` belong to :meth:`cases`."""
        concepts, count = len(self.directions), len(self.asked)
        # The unsteered answers stand once; every concept was judged on them.
        every = [*list(answers[:count]) * concepts, *answers[count:]]
        shape = (1 + len(self.scales), concepts, count)
        values = np.array([np.nan if g.value is None else g.value for g in grades]).reshape(shape)
        perplexity = np.array(
            [np.nan if a.perplexity is None else a.perplexity for a in every]
        ).reshape(shape)
        loops = np.array([repetition(a.text) for a in every]).reshape(shape)
        by_scale = [Answers(*parts) for parts in zip(values, perplexity, loops, strict=True)]
        names = tuple(self.directions)
        whole = Grid(names, (0.0, *self.scales), tuple(by_scale))
        steered = Grid(names, self.scales, tuple(by_scale[1:]))
        tuning, heldout = slice(len(self.questions.tuning)), slice(len(self.questions.tuning), None)
        try:
            return measure(
                steered.questions(tuning),
                steered.questions(heldout),
                whole.questions(heldout).answers[0],
            )
        except EvaluationError as error:
            first = next((grade.error for grade in grades if grade.error), "")
            raise EvaluationError(f"{self.name}: {error}; the first error: {first}") from error


def subject_of(
    pack: SteeringPack,
    questions: QuestionSet,
    concept_class: str | None = None,
    scales: Sequence[float] | None = None,
    concepts: Sequence[str] | None = None,
    layers: Sequence[int] | None = None,
) -> Subject:
    """Returns a pack as a subject.

    Args:
        pack: The pack.
        questions: What is asked.
        concept_class: Its class; None for the pack's name where that is a class.
        scales: Scales; None for a grid around the median of the directions' default scales.
        concepts: Directions to sweep; None for all.
        layers: Layers to steer; None for all of the directions'.

    Raises:
        EvaluationError: A direction does not exist or the scales are unusable.
    """
    names = list(pack.directions) if concepts is None else list(dict.fromkeys(concepts))
    for name in names:
        if name not in pack.directions:
            raise EvaluationError(
                f"pack {pack.name!r} has no direction {name!r}; {choices(name, pack.directions)}"
            )
    if scales is None:
        middle = float(np.median([pack.directions[name].default_scale for name in names]))
        scales = [factor * middle for factor in _FACTORS]
    return Subject(
        pack.name,
        concept_class or class_of(pack),
        {name: f"{pack.name}/{name}" for name in names},
        tuple(scales),
        questions,
        None if layers is None else tuple(layers),
    )


def class_of(pack: SteeringPack) -> str:
    """Returns the class that a pack's name says, or the general one."""
    return pack.name if pack.name in PREFIX_TEMPLATES else GENERAL


def run_sweep(
    generator: Generator, subjects: Sequence[Subject], judge: Judge, seed: int = 0
) -> SweepResult:
    """Answers, judges and measures.

    Args:
        generator: Engine with the packs of all subjects.
        subjects: What to sweep, each under a name of its own.
        judge: The judge.
        seed: Seed of the bootstrap.

    Raises:
        EvaluationError: Generation failed, or the judge graded nothing of some class. What was
            answered is kept if the generator keeps answers.
    """
    counts = Counter(subject.name for subject in subjects)
    if not counts or max(counts.values()) > 1:
        raise EvaluationError(f"subjects must have distinct names, not {sorted(counts.elements())}")
    requests = [subject.requests() for subject in subjects]
    answers = _split(generator.answer([r for part in requests for r in part]), requests)
    cases = [list(s.cases(part)) for s, part in zip(subjects, answers, strict=True)]
    grades = _split(judge.grade([case for part in cases for case in part]), cases)
    measured = [
        subject.measured(part, judged)
        for subject, part, judged in zip(subjects, answers, grades, strict=True)
    ]
    faults = dict.fromkeys(grade.error for part in grades for grade in part if grade.error)
    return SweepResult(
        model=public_name(generator.model),
        judge=judge.name,
        max_tokens=generator.max_tokens,
        seed=seed,
        packs={pack.name: pack.manifest.tensors.sha256 for pack in generator.packs},
        tuning_questions={s.name: [q.line for q in s.questions.tuning] for s in subjects},
        heldout_questions={s.name: [q.line for q in s.questions.heldout] for s in subjects},
        classes=_results(subjects, measured, seed),
        judge_faults=list(faults)[:_SHOWN_FAULTS],
    )


def _results(
    subjects: Sequence[Subject], measured: Sequence[Measured], seed: int
) -> list[ClassResult]:
    results = [
        class_result(subject.name, found, seed)
        for subject, found in zip(subjects, measured, strict=True)
    ]
    return results if len(results) == 1 else [*results, joint_result(ALL, measured, seed)]


def _split(flat: Sequence[T], like: Sequence[Sequence[object]]) -> list[list[T]]:
    """Cuts a list into parts of the lengths of others."""
    rest = iter(flat)
    return [[next(rest) for _ in part] for part in like]


def public_name(model: str | os.PathLike[str]) -> str:
    """Returns a model as it is shown: a hub id, or the last part of a path."""
    local = Path(model)
    return local.resolve().name if local.exists() else str(model)
