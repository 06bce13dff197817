"""Steerability: scales chosen on tuning answers alone, intervals over concepts, failures counted."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binom

from offline.scores import (
    Answers,
    Grid,
    class_result,
    figures,
    interval,
    joint_result,
    measure,
    repetition,
)
from vllm_steer.errors import EvaluationError

SCALES = (2.0, 4.0, 8.0)


def answers(grades: list[list[float]], perplexity: float = 2.0) -> Answers:
    values = np.array(grades, dtype=float)
    return Answers(values, np.full(values.shape, perplexity), np.zeros(values.shape))


def grid(*grades: list[list[float]]) -> Grid:
    names = tuple(f"c{index}" for index in range(len(grades[0])))
    parts = (answers(part, 2.0 * (index + 1)) for index, part in enumerate(grades))
    return Grid(names, SCALES, tuple(parts))


def test_the_scale_is_chosen_on_tuning_answers_and_reported_on_others() -> None:
    tuning = grid([[0.0], [0.0]], [[1.0], [1.0]], [[1.0], [0.0]])
    heldout = grid([[1.0], [1.0]], [[1.0], [0.0]], [[0.0], [0.0]])
    found = class_result("fears", measure(tuning, heldout, answers([[0.0], [0.0]])), 0)
    assert found.scale == 4.0
    assert found.single.steerability == 0.5
    assert found.single.perplexity == pytest.approx(4.0)
    assert found.by_concept == {"c0": 1.0, "c1": 0.0}
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
    found = class_result("fears", measure(tuning, tuning, answers([[0.0]])), 0)
    assert found.scale == scale
    assert found.concept_scales == {"c0": scale}


def test_each_concept_at_its_own_scale() -> None:
    tuning = grid([[1.0], [0.0]], [[0.0], [0.0]], [[0.0], [1.0]])
    heldout = grid([[0.7], [0.0]], [[0.0], [0.0]], [[0.0], [0.9]])
    found = class_result("fears", measure(tuning, heldout, answers([[0.0], [0.0]])), 0)
    assert found.concept_scales == {"c0": 2.0, "c1": 8.0}
    assert found.own.steerability == pytest.approx(0.8)
    assert found.own.perplexity == pytest.approx(np.sqrt(2.0 * 6.0))


def test_the_oracle_takes_each_answers_best_scale() -> None:
    tuning = grid([[1.0]], [[0.0]], [[0.0]])
    heldout = grid([[0.0, 0.0]], [[1.0, 0.0]], [[1.0, 0.5]])
    found = class_result("fears", measure(tuning, heldout, answers([[0.0, 0.0]])), 0)
    assert found.single.steerability == 0.0
    assert found.oracle.steerability == 0.75
    assert found.oracle.perplexity == pytest.approx(np.sqrt(4.0 * 6.0))


def test_a_judges_failures_are_counted_and_count_in_no_grade() -> None:
    nan = float("nan")
    found = figures([answers([[1.0, nan], [nan, nan], [0.0, 0.0]])], 0)
    assert (found.answers, found.judge_errors) == (6, 3)
    assert found.steerability == 0.5
    tuning = grid([[nan]], [[0.0]], [[nan]])
    assert class_result("fears", measure(tuning, tuning, answers([[nan]])), 0).scale == 4.0


def test_nothing_graded_is_an_error() -> None:
    nan = float("nan")
    empty, full = grid([[nan]], [[nan]], [[nan]]), grid([[1.0]], [[1.0]], [[1.0]])
    with pytest.raises(EvaluationError, match="none of the 3 answers to tuning questions"):
        measure(empty, full, answers([[0.0]]))
    with pytest.raises(EvaluationError, match="held-out"):
        measure(full, empty, answers([[0.0]]))


def test_the_interval_is_that_of_a_mean_of_coin_flips() -> None:
    low, high = interval(np.repeat([0.0, 1.0], [30, 70]), 0)
    assert low == pytest.approx(binom.ppf(0.025, 100, 0.7) / 100, abs=0.02)
    assert high == pytest.approx(binom.ppf(0.975, 100, 0.7) / 100, abs=0.02)
    assert (low, high) == interval(np.repeat([0.0, 1.0], [30, 70]), 0)


def test_concepts_are_resampled_and_not_answers() -> None:
    """A hundred equal answers of two concepts say no more than one answer of each."""
    one, many = answers([[0.0], [1.0]]), answers([[0.0] * 100, [1.0] * 100])
    assert figures([one], 0).low == figures([many], 0).low == 0.0
    assert figures([answers([[1.0, 0.0]])], 0).low is None


def test_classes_together_keep_their_own_scales() -> None:
    weak, strong = grid([[1.0]], [[0.0]], [[0.0]]), grid([[0.0]], [[0.0]], [[1.0]])
    plain = answers([[0.0]])
    both = [measure(weak, weak, plain), measure(strong, strong, plain)]
    joint = joint_result("all", both, 0)
    assert joint.scale is None
    assert joint.single.steerability == 1.0
    assert (joint.single.low, joint.single.high) == (1.0, 1.0)


def test_repetition() -> None:
    assert repetition("Soil and soil and soil and") == pytest.approx(3 / 5)
    assert repetition("every word of this differs") == 0.0
    assert repetition("") == 0.0
