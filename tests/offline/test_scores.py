"""Steerability: scales chosen on tuning answers alone, intervals over concepts, failures counted."""

from __future__ import annotations

import numpy as np
import pytest

from vllm_steer.errors import EvaluationError
from vllm_steer.offline.evaluate.grids import Answers, Doubles, Grid
from vllm_steer.offline.evaluate.results import ClassResult
from vllm_steer.offline.evaluate.scores import (
    LEAST_GAP,
    class_result,
    figures,
    joint_result,
    measure,
)
from vllm_steer.offline.measures.fluency import Fluency, repetition
from vllm_steer.offline.measures.intervals import mean_interval, ratio_interval

SCALES = (2.0, 4.0, 8.0)
NAN = float("nan")
# So fluent that the perplexities of :func:`grid` are within the bound.
UNSTEERED = Fluency(0.0, 2.0)


def answers(
    grades: list[list[float]],
    perplexity: float = 2.0,
    repeated: float = 0.0,
    raised: float = NAN,
    gap: float = NAN,
) -> Answers:
    values = np.array(grades, dtype=float)

    def every(value: float) -> Doubles:
        return np.full(values.shape, value)

    return Answers(values, every(perplexity), every(repeated), every(raised), every(gap))


def grid(*grades: list[list[float]], floor: Fluency = UNSTEERED) -> Grid:
    """Perplexities 2, 4 and 6; no prefix is known."""
    names = tuple(f"c{index}" for index in range(len(grades[0])))
    parts = (answers(part, 2.0 * (index + 1)) for index, part in enumerate(grades))
    shape = np.shape(grades[0])
    return Grid(
        names,
        SCALES,
        tuple(parts),
        answers(np.zeros(shape).tolist(), floor.perplexity, floor.repetition),
        answers(np.full(shape, NAN).tolist(), NAN, NAN),
    )


def measured(tuning: Grid, heldout: Grid) -> ClassResult:
    return class_result("fears", measure(tuning, heldout))


def test_the_scale_is_chosen_on_tuning_answers_and_reported_on_others() -> None:
    tuning = grid([[0.0], [0.0]], [[1.0], [1.0]], [[1.0], [0.0]])
    heldout = grid([[1.0], [1.0]], [[1.0], [0.0]], [[0.0], [0.0]])
    found = measured(tuning, heldout)
    assert found.scale == 4.0
    assert found.single.steerability == 0.5
    assert found.single.perplexity == pytest.approx(4.0)
    assert [one.single.steerability for one in found.concepts] == [1.0, 0.0]
    assert [point.figures.steerability for point in found.tuning] == [0.0, 1.0, 0.5]
    assert [point.figures.steerability for point in found.heldout] == [1.0, 0.5, 0.0]


@pytest.mark.parametrize(
    ("grades", "scale"),
    [((1.0, 1.0, 1.0), 4.0), ((0.0, 1.0, 0.995), 4.0), ((0.0, 0.9, 1.0), 8.0), ((1, 0, 0), 2.0)],
)
def test_the_middle_of_equally_good_scales_is_taken(
    grades: tuple[float, ...], scale: float
) -> None:
    tuning = grid(*([[grade]] for grade in grades))
    found = measured(tuning, tuning)
    assert found.scale == scale
    assert [one.scale for one in found.concepts] == [scale]


def test_each_concept_at_its_own_scale() -> None:
    tuning = grid([[1.0], [0.0]], [[0.0], [0.0]], [[0.0], [1.0]])
    heldout = grid([[0.7], [0.0]], [[0.0], [0.0]], [[0.0], [0.9]])
    found = measured(tuning, heldout)
    assert {one.name: one.scale for one in found.concepts} == {"c0": 2.0, "c1": 8.0}
    assert found.own.steerability == pytest.approx(0.8)
    assert found.own.perplexity == pytest.approx(np.sqrt(2.0 * 6.0))


def test_the_oracle_takes_each_answers_best_scale() -> None:
    tuning = grid([[1.0]], [[0.0]], [[0.0]])
    heldout = grid([[0.0, 0.0]], [[1.0, 0.0]], [[1.0, 0.5]])
    found = measured(tuning, heldout)
    assert found.single.steerability == 0.0
    assert found.oracle.steerability == 0.75
    assert found.oracle.perplexity == pytest.approx(np.sqrt(4.0 * 6.0))


def test_a_judges_failures_are_counted_and_count_in_no_grade() -> None:
    found = figures([answers([[1.0, NAN], [NAN, NAN], [0.0, 0.0]])])
    assert (found.answers, found.judge_errors) == (6, 3)
    assert found.steerability == 0.5
    tuning = grid([[NAN]], [[0.0]], [[NAN]])
    assert measured(tuning, tuning).scale == 4.0


def test_nothing_graded_is_an_error() -> None:
    empty, full = grid([[NAN]], [[NAN]], [[NAN]]), grid([[1.0]], [[1.0]], [[1.0]])
    with pytest.raises(EvaluationError, match="none of the 3 answers to tuning questions"):
        measure(empty, full)
    with pytest.raises(EvaluationError, match="held-out"):
        measure(full, empty)


def test_intervals_are_over_concepts_and_not_answers() -> None:
    """A hundred equal answers of two concepts say no more than one answer of each."""
    one, many = answers([[0.0], [1.0]]), answers([[0.0] * 100, [1.0] * 100])
    assert figures([one]).low == figures([many]).low == 0.0
    assert figures([one]).high == 1.0, "a mean of grades does not leave their range"
    assert figures([answers([[1.0, 0.0]])]).low is None


def test_classes_together_keep_their_own_scales() -> None:
    weak, strong = grid([[1.0]], [[0.0]], [[0.0]]), grid([[0.0]], [[0.0]], [[1.0]])
    both = [measure(weak, weak), measure(strong, strong)]
    joint = joint_result("all", both)
    assert joint.scale is None
    assert joint.single.steerability == 1.0
    assert (joint.single.low, joint.single.high) == (None, None), "all grades are equal"


def test_only_fluent_scales_are_chosen_and_the_weakest_where_none_is() -> None:
    """Without a prefix text may be three times as perplexing as unsteered, and repeat a little more."""
    best_last = grid([[0.1]], [[0.2]], [[1.0]], floor=Fluency(0.0, 1.5))
    found = measured(best_last, best_last)
    assert (found.scale, found.fluent) == (4.0, True)
    assert (found.concepts[0].scale, found.concepts[0].fluent) == (4.0, True)
    assert [point.fluent for point in found.heldout] == [True, True, False]
    assert found.bound is not None
    assert found.bound.repetition == pytest.approx(0.05)
    assert found.bound.perplexity == pytest.approx(4.5)
    assert found.bound.prefixed == 0
    assert found.oracle.steerability == 1.0
    none = grid([[0.1]], [[0.2]], [[1.0]], floor=Fluency(0.0, 0.5))
    found = measured(none, none)
    assert (found.scale, found.fluent) == (2.0, False)
    assert (found.concepts[0].scale, found.concepts[0].fluent) == (2.0, False)


def test_the_prefixed_answers_bound_what_is_fluent_where_they_are_known() -> None:
    """Two concepts, one with a prefix; each has its own bound, and together they have the mean."""
    parts = [
        answers([[0.0], [0.0]], 2.0),
        answers([[1.0], [1.0]], 2.0),
        answers([[1.0], [1.0]], 7.0),
    ]
    parts[1] = Answers(
        parts[1].grades, parts[1].perplexity, np.array([[0.16], [0.0]]), *parts[1].arrays()[3:]
    )
    floor = answers([[0.0], [0.0]], 2.5)
    ceiling = answers([[1.0], [NAN]], 2.0, 0.1)
    for array in ceiling.arrays():
        array[1] = NAN
    both = Grid(("known", "unknown"), SCALES, tuple(parts), floor, ceiling)
    assert both.known.tolist() == [True, False]
    assert both.bounds == [Fluency(pytest.approx(0.15), 3.0), Fluency(0.05, 7.5)]
    assert both.fluent.T.tolist() == [[True, False, False], [True, True, True]]
    # 0.08 of at most 0.1, then 7 of at most the geometric mean of 3 and 7.5.
    assert both.jointly_fluent.tolist() == [True, True, False]
    found = measured(both, both)
    assert found.scale == 4.0
    assert [one.scale for one in found.concepts] == [2.0, 4.0]
    assert found.prefixed is not None
    assert (found.prefixed.steerability, found.prefixed.answers) == (1.0, 1)
    assert [one.prefixed is None for one in found.concepts] == [False, True]
    assert found.bound is not None
    assert found.bound.prefixed == 1


def test_empty_answers_are_not_fluent() -> None:
    silent = grid([[0.5]], [[1.0]], [[0.0]])
    silent.answers[1].perplexity[:] = NAN
    assert silent.fluent[:, 0].tolist() == [True, False, True]
    assert measured(silent, silent).scale == 2.0


def test_the_gap_closed_is_summed_over_questions_and_averaged_over_concepts() -> None:
    """The first concept closes 12 of 16 nats, the second 1 of 4; the third has no gap to speak of."""
    part = answers([[1.0] * 3] * 3)
    part.raised[:] = [[0.0, 4.0, 8.0], [1.0, 1.0, -1.0], [5.0, 5.0, 5.0]]
    part.gap[:] = [[2.0, 4.0, 10.0], [1.0, 1.0, 2.0], [0.0, 0.0, LEAST_GAP / 2]]
    found = figures([part])
    assert found.gap_closed == pytest.approx((0.75 + 0.25) / 2)
    assert (found.gap_low, found.gap_high) == mean_interval(np.array([0.75, 0.25]))
    one = figures([part.some(slice(0, 1), slice(None))])
    assert one.gap_closed == pytest.approx(0.75)
    # Over questions.
    over = ratio_interval(part.raised[0], part.gap[0])
    assert (one.gap_low, one.gap_high) == over
    two = figures([part.some(slice(0, 1), slice(0, 2))])
    assert (two.gap_closed, two.gap_low) == (pytest.approx(4 / 6), None)
    assert figures([part.some(slice(2, 3), slice(None))]).gap_closed is None


def test_classes_together_have_the_ceiling_of_those_that_know_one() -> None:
    unknown = grid([[1.0]], [[1.0]], [[1.0]])
    known = Grid(
        ("k",),
        SCALES,
        tuple(answers([[0.5]], raised=2.0, gap=8.0) for _ in SCALES),
        answers([[0.0]], raised=0.0, gap=8.0),
        answers([[0.9]], raised=8.0, gap=8.0),
    )
    joint = joint_result("all", [measure(unknown, unknown), measure(known, known)])
    assert joint.prefixed is not None
    assert (joint.prefixed.steerability, joint.prefixed.gap_closed) == (0.9, 1.0)
    assert (joint.single.gap_closed, joint.unsteered.gap_closed) == (0.25, 0.0)
    assert (joint.bound, joint.fluent) == (None, None)
    assert joint_result("all", [measure(unknown, unknown)]).prefixed is None


def test_repetition() -> None:
    assert repetition("Soil and soil and soil and") == pytest.approx(3 / 5)
    assert repetition("every word of this differs") == 0.0
    assert repetition("") == 0.0
