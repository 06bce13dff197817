"""Results of sweeps for the tests of pictures and cards."""

from __future__ import annotations

from offline.results import ClassResult, Figures, Point, SweepResult


def given(steerability: float, perplexity: float = 9.0, errors: int = 0) -> Figures:
    return Figures(
        steerability=steerability,
        low=steerability / 2,
        high=steerability,
        perplexity=perplexity,
        repetition=0.1,
        answers=8,
        judge_errors=errors,
    )


def class_result(name: str, steerability: float = 0.75, errors: int = 0) -> ClassResult:
    points = [Point(scale=4.0, figures=given(0.25)), Point(scale=8.0, figures=given(steerability))]
    return ClassResult(
        name=name,
        concepts=["spiders", "heights"],
        scale=8.0,
        concept_scales={"spiders": 4.0, "heights": 8.0},
        single=given(steerability, 20.0, errors),
        own=given(0.5),
        oracle=given(1.0),
        unsteered=given(0.0, 1.5),
        by_concept={"spiders": 1.0, "heights": 0.5},
        tuning=points,
        heldout=[*points, Point(scale=16.0, figures=given(0.1, 400.0, errors))],
    )


def sweep_result(packs: dict[str, str], errors: int = 0) -> SweepResult:
    """A result of the packs, by name and digest of their tensors."""
    return SweepResult(
        model="m",
        judge="demo",
        max_tokens=48,
        seed=0,
        packs=packs,
        tuning_questions={name: ["a"] for name in packs},
        heldout_questions={name: ["b"] for name in packs},
        classes=[class_result(name, errors=errors) for name in packs],
        judge_faults=["the reply does not end in a grade"] if errors else [],
    )
