"""Results of sweeps for the tests of tables, pictures and cards."""

from __future__ import annotations

from vllm_steer.offline.evaluate.results import (
    Bound,
    ClassResult,
    ConceptResult,
    Figures,
    Point,
    SweepResult,
)
from vllm_steer.packs.pack import Prefix


def given(
    steerability: float, perplexity: float = 9.0, errors: int = 0, gap: float | None = None
) -> Figures:
    return Figures(
        steerability=steerability,
        low=steerability / 2,
        high=steerability,
        gap_closed=gap,
        gap_low=None if gap is None else gap - 0.25,
        gap_high=gap,
        perplexity=perplexity,
        repetition=0.1,
        answers=8,
        judge_errors=errors,
    )


def point(scale: float, figures: Figures, fluent: bool = True) -> Point:
    return Point(scale=scale, fluent=fluent, figures=figures)


def concept_result(name: str, scale: float, fluent: bool = True) -> ConceptResult:
    points = [point(4.0, given(0.25)), point(8.0, given(0.7), fluent)]
    return ConceptResult(
        name=name,
        scale=scale,
        fluent=fluent,
        single=given(0.6),
        own=given(0.7, 11.0, gap=0.65),
        unsteered=given(0.05),
        prefixed=given(0.9),
        tuning=points,
        heldout=points,
    )


def class_result(name: str, steerability: float = 0.75, errors: int = 0) -> ClassResult:
    points = [point(4.0, given(0.25)), point(8.0, given(steerability, gap=0.5))]
    return ClassResult(
        name=name,
        scale=8.0,
        fluent=True,
        bound=Bound(repetition=0.15, perplexity=25.0, prefixed=2),
        concepts=[concept_result("spiders", 4.0), concept_result("a | b", 8.0, fluent=False)],
        single=given(steerability, 20.0, errors, gap=0.5),
        own=given(0.5),
        oracle=given(1.0),
        unsteered=given(0.0, 1.5),
        prefixed=given(0.95, 18.0),
        tuning=points,
        heldout=[*points, point(16.0, given(0.1, 400.0, errors), fluent=False)],
    )


def sweep_result(packs: dict[str, str], errors: int = 0) -> SweepResult:
    """A result of the packs, by name and digest of their tensors."""
    return SweepResult(
        model="m",
        judge="demo",
        max_tokens=48,
        packs=packs,
        prefixes={f"{name}/spiders": Prefix(text="Fear spiders.") for name in packs},
        tuning_questions={name: ["a"] for name in packs},
        heldout_questions={name: ["b"] for name in packs},
        classes=[class_result(name, errors=errors) for name in packs],
        judge_faults=["the reply does not end in a grade"] if errors else [],
    )
