"""The sweep: every concept at every scale on every question, judged, and a scale chosen.

Also asked are the unsteered model, the floor, and the model with each concept's prefix, the
ceiling; between them lies the gap that is closed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TypeVar

from vllm_steer.errors import EvaluationError
from vllm_steer.offline.evaluate.gaps import measure_gaps
from vllm_steer.offline.evaluate.generation import Generator
from vllm_steer.offline.evaluate.judges import Judge
from vllm_steer.offline.evaluate.results import ClassResult, SweepResult
from vllm_steer.offline.evaluate.scores import Measured, class_result, joint_result
from vllm_steer.offline.evaluate.subjects import Subject
from vllm_steer.offline.models.loading import public_name

ALL = "all"
_SHOWN_FAULTS = 5
T = TypeVar("T")


def run_sweep(generator: Generator, subjects: Sequence[Subject], judge: Judge) -> SweepResult:
    """Answers, judges and measures.

    Args:
        generator: Engine with the packs of all subjects.
        subjects: Subjects of the sweep, with distinct names.
        judge: The judge.

    Raises:
        EvaluationError: Generation failed, or the judge graded nothing of some class. Answers are kept if the
            generator stores them.
    """
    counts = Counter(subject.name for subject in subjects)
    if not counts or max(counts.values()) > 1:
        raise EvaluationError(f"subjects must have distinct names, not {sorted(counts.elements())}")
    requests = [subject.requests() for subject in subjects]
    answers = _split(generator.answer([r for part in requests for r in part]), requests)
    gaps = measure_gaps(
        generator, [(s, s.prefixed(part)) for s, part in zip(subjects, answers, strict=True)]
    )
    cases = [list(s.cases(part)) for s, part in zip(subjects, answers, strict=True)]
    grades = _split(judge.grade([case for part in cases for case in part]), cases)
    measured = [
        subject.measured(part, judged, gap)
        for subject, part, judged, gap in zip(subjects, answers, grades, gaps, strict=True)
    ]
    faults = dict.fromkeys(grade.error for part in grades for grade in part if grade.error)
    return SweepResult(
        model=public_name(generator.engine.model),
        judge=judge.name,
        max_tokens=generator.max_tokens,
        packs={pack.name: pack.manifest.tensors.sha256 for pack in generator.engine.packs},
        prefixes={s.directions[name]: s.prefixes[name] for s in subjects for name in s.known},
        tuning_questions={s.name: [q.line for q in s.questions.tuning] for s in subjects},
        heldout_questions={s.name: [q.line for q in s.questions.heldout] for s in subjects},
        classes=_results(subjects, measured),
        judge_faults=list(faults)[:_SHOWN_FAULTS],
    )


def _results(subjects: Sequence[Subject], measured: Sequence[Measured]) -> list[ClassResult]:
    results = [
        class_result(subject.name, found) for subject, found in zip(subjects, measured, strict=True)
    ]
    return results if len(results) == 1 else [*results, joint_result(ALL, measured)]


def _split(flat: Sequence[T], like: Sequence[Sequence[object]]) -> list[list[T]]:
    """Splits a list into parts with the lengths of others."""
    rest = iter(flat)
    return [[next(rest) for _ in part] for part in like]
