"""Rows by absolute position: chunks, resumption, sharing and reuse of rows."""

from __future__ import annotations

import random

import numpy as np
import pytest

from vllm_steer.engine.plan import StepPlanner, TokenSpan
from vllm_steer.resolve import Segment, SteeringPlan, Term


def segment(start: int, end: int | None, name: str) -> Segment:
    return Segment(start, end, (Term(name, 1.0, (0,)),))


def test_nothing_steered_costs_nothing() -> None:
    planner = StepPlanner(4)
    assert planner.plan([TokenSpan("a", 0, 5)]).rows is None
    planner.add("b", SteeringPlan((segment(0, None, "x"),)))
    assert planner.plan([TokenSpan("a", 0, 5)]).rows is None
    planner.add("c", SteeringPlan(()))
    planner.remove("b")
    assert planner.plan([TokenSpan("b", 5, 1)]).rows is None


def test_rows_follow_the_batch_order() -> None:
    planner = StepPlanner(4)
    planner.add("b", SteeringPlan((segment(0, 3, "x"), segment(3, None, "y"))))
    step = planner.plan([TokenSpan("a", 7, 2), TokenSpan("b", 1, 4), TokenSpan("c", 0, 1)])
    rows = {segment.terms[0].digest: row for row, segment in step.new}
    assert step.rows is not None
    assert step.rows.tolist() == [0, 0, rows["x"], rows["x"], rows["y"], rows["y"], 0]


def test_any_chunking_gives_the_rows_of_one_chunk() -> None:
    """Prefill in chunks, preemption and recomputation are nothing but other spans."""
    generator = random.Random(0)
    content = SteeringPlan((segment(2, 11, "x"), segment(11, 17, "y"), segment(17, None, "z")))
    whole = StepPlanner(8)
    whole.add("r", content)
    expected = whole.plan([TokenSpan("r", 0, 30)])
    assert expected.rows is not None
    names = {row: s.terms[0].digest for row, s in expected.new} | {0: ""}
    for _ in range(50):
        planner, seen, known = StepPlanner(8), [], {0: ""}
        planner.add("r", content)
        position = 0
        while position < 30:
            length = min(generator.randint(1, 9), 30 - position)
            step = planner.plan([TokenSpan("r", position, length)])
            known |= {row: s.terms[0].digest for row, s in step.new}
            rows = np.zeros(length, int) if step.rows is None else step.rows
            seen += [known[row] for row in rows]
            position += length
        assert seen == [names[row] for row in expected.rows]


def test_equal_combinations_share_a_row() -> None:
    planner = StepPlanner(3)
    for name in "abcd":
        planner.add(name, SteeringPlan((segment(0, None, "x" if name < "c" else "y"),)))
    step = planner.plan([TokenSpan(name, 4, 1) for name in "abcd"])
    assert step.rows is not None
    assert step.rows[0] == step.rows[1] != step.rows[2] == step.rows[3]
    assert len(step.new) == 2
    assert planner.plan([TokenSpan(name, 5, 1) for name in "abcd"]).new == ()


def test_the_least_recently_used_row_is_given_away() -> None:
    planner = StepPlanner(3)
    for name in "xyz":
        planner.add(name, SteeringPlan((segment(0, None, name),)))
    (x_row, _), (y_row, _) = planner.plan([TokenSpan("x", 0, 1), TokenSpan("y", 0, 1)]).new
    planner.plan([TokenSpan("x", 1, 1)])
    ((z_row, _),) = planner.plan([TokenSpan("x", 2, 1), TokenSpan("z", 0, 1)]).new
    assert z_row == y_row
    step = planner.plan([TokenSpan("x", 3, 1), TokenSpan("z", 1, 1)])
    assert step.new == ()
    assert step.rows is not None
    assert step.rows.tolist() == [x_row, z_row]


def test_too_many_combinations_are_refused_not_dropped() -> None:
    planner = StepPlanner(2)
    for name in "xy":
        planner.add(name, SteeringPlan((segment(0, None, name),)))
    with pytest.raises(RuntimeError, match="raise --steering-rows"):
        planner.plan([TokenSpan("x", 0, 1), TokenSpan("y", 0, 1)])
