"""The gap that steering closes: the prefixed model's own answers, scored without the prefix."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product

import numpy as np

from vllm_steer.offline.calibrate.grid import subject as direction_of
from vllm_steer.offline.calibrate.measures import Gap, Trial, measured_gaps, steered_likelihoods
from vllm_steer.offline.evaluate.generation import Answer, Generator
from vllm_steer.offline.evaluate.grids import Doubles, Gaps
from vllm_steer.offline.evaluate.subjects import Subject
from vllm_steer.offline.extract.answers import Example


def measure_gaps(
    generator: Generator, classes: Sequence[tuple[Subject, Sequence[Sequence[Answer]]]]
) -> list[Gaps]:
    """Measures the gaps of all classes, and the shares closed at every scale, in the same batches.

    Args:
        generator: The generator of the answers, with the packs of all subjects.
        classes: Each subject, and the prefixed answers to its questions by known concept.

    Raises:
        EvaluationError: The engine fails.
    """
    examples = [
        _examples(generator, subject, concept, given)
        for subject, answers in classes
        for concept, given in zip(subject.known, answers, strict=True)
    ]
    if not examples:
        return [_gaps(subject, [], iter(())) for subject, _ in classes]
    measured = iter(measured_gaps(generator.engine, examples, "the gap"))
    by_class = [(subject, [next(measured) for _ in subject.known]) for subject, _ in classes]
    trials = [trial for subject, gaps in by_class for trial in _trials(generator, subject, gaps)]
    steered = iter(steered_likelihoods(generator.engine, trials, "the gap, steered"))
    return [_gaps(subject, gaps, steered) for subject, gaps in by_class]


def _examples(
    generator: Generator, subject: Subject, concept: str, answers: Sequence[Answer]
) -> list[Example]:
    return [
        Example(
            generator.prompt(question.asked),
            generator.prompt(question.asked, subject.prefixes[concept]),
            answer.tokens,
            answer.log_likelihood,
        )
        for question, answer in zip(subject.asked, answers, strict=True)
    ]


def _trials(generator: Generator, subject: Subject, gaps: Sequence[Gap]) -> list[tuple[Trial, Gap]]:
    """Every scale, and at each of them every known concept."""
    packs = {pack.name: pack for pack in generator.engine.packs}
    found = []
    for scale, (concept, gap) in product(subject.scales, zip(subject.known, gaps, strict=True)):
        pack, _, name = subject.directions[concept].partition("/")
        direction = direction_of(packs[pack], name)
        layers = subject.layers or tuple(direction.record.steered_layers)
        found.append((Trial(direction, scale, layers), gap))
    return found


def _gaps(subject: Subject, gaps: Sequence[Gap], steered: Iterator[Doubles]) -> Gaps:
    """Takes a subject's part from the likelihoods of :func:`_trials`."""
    shape = (len(subject.directions), len(subject.asked))
    places = [list(subject.directions).index(concept) for concept in subject.known]
    gap, raised = np.full(shape, np.nan), np.full((len(subject.scales), *shape), np.nan)
    for at, found in zip(places, gaps, strict=True):
        gap[at] = found.prefixed - found.plain
    for row, (at, found) in product(raised, zip(places, gaps, strict=True)):
        row[at] = next(steered) - found.plain
    return Gaps(gap, raised)
