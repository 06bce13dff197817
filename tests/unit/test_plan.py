"""Rows by absolute position: chunks, resumption, sharing and reuse of rows."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch

from vllm_steer.engine.bank import SteeringBank
from vllm_steer.engine.plan import StepPlan, StepPlanner, TokenSpan
from vllm_steer.resolve import Segment, SteeringPlan, Term


def segment(start: int, end: int | None, name: str) -> Segment:
    return Segment(start, end, (Term(name, 1.0, (0,)),))


def rows_of(step: StepPlan, spans: Sequence[TokenSpan]) -> list[int]:
    """The row of each token, as the bank gives them."""
    positions = torch.tensor([p for s in spans for p in range(s.start, s.start + s.length)])
    bank = SteeringBank([0], 8, 4, len(positions) + 3, torch.float32, torch.device("cpu"))
    bank.set_rows(torch.full_like(bank.rows, 7))
    if step.owners is None:
        bank.clear_rows()
    else:
        bank.assign_rows(step.owners, step.ranges, positions)
    assert not bank.rows[len(positions) :].any()
    return bank.rows[: len(positions)].tolist()


def test_nothing_steered_costs_nothing() -> None:
    planner = StepPlanner(4)
    assert planner.plan([TokenSpan("a", 0, 5)]).owners is None
    planner.add("b", SteeringPlan((segment(0, None, "x"),)))
    assert planner.plan([TokenSpan("a", 0, 5)]).owners is None
    planner.add("c", SteeringPlan(()))
    planner.remove("b")
    assert planner.plan([TokenSpan("b", 5, 1)]).owners is None


def test_rows_follow_the_batch_order() -> None:
    planner = StepPlanner(4)
    planner.add("b", SteeringPlan((segment(0, 3, "x"), segment(3, None, "y"))))
    spans = [TokenSpan("a", 7, 2), TokenSpan("b", 1, 4), TokenSpan("c", 0, 1)]
    step = planner.plan(spans)
    rows = {segment.terms[0].digest: row for row, segment in step.new}
    assert rows_of(step, spans) == [0, 0, rows["x"], rows["x"], rows["y"], rows["y"], 0]


def test_positions_decide_when_the_starts_are_optimistic() -> None:
    """Under speculative decoding the host counts drafts that were rejected."""
    planner = StepPlanner(8, starts_are_exact=False)
    planner.add("r", SteeringPlan((segment(4, 6, "x"), segment(6, None, "y"))))
    step = planner.plan([TokenSpan("r", 8, 3)])
    rows = {segment.terms[0].digest: row for row, segment in step.new}
    truly = [TokenSpan("r", 5, 3)]
    assert rows_of(step, truly) == [rows["x"], rows["y"], rows["y"]]


def test_any_chunking_gives_the_rows_of_one_chunk() -> None:
    """Prefill in chunks, preemption and recomputation are nothing but other spans."""
    generator = random.Random(0)
    content = SteeringPlan((segment(2, 11, "x"), segment(11, 17, "y"), segment(17, None, "z")))
    whole = StepPlanner(8)
    whole.add("r", content)
    everything = [TokenSpan("r", 0, 30)]
    expected = whole.plan(everything)
    names = {row: s.terms[0].digest for row, s in expected.new} | {0: ""}
    for _ in range(50):
        planner, seen, known = StepPlanner(8), [], {0: ""}
        planner.add("r", content)
        position = 0
        while position < 30:
            length = min(generator.randint(1, 9), 30 - position)
            spans = [TokenSpan("r", position, length)]
            step = planner.plan(spans)
            known |= {row: s.terms[0].digest for row, s in step.new}
            seen += [known[row] for row in rows_of(step, spans)]
            position += length
        assert seen == [names[row] for row in rows_of(expected, everything)]


def test_equal_combinations_share_a_row() -> None:
    planner = StepPlanner(3)
    for name in "abcd":
        planner.add(name, SteeringPlan((segment(0, None, "x" if name < "c" else "y"),)))
    spans = [TokenSpan(name, 4, 1) for name in "abcd"]
    step = planner.plan(spans)
    rows = rows_of(step, spans)
    assert rows[0] == rows[1] != rows[2] == rows[3]
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
    spans = [TokenSpan("x", 3, 1), TokenSpan("z", 1, 1)]
    step = planner.plan(spans)
    assert step.new == ()
    assert rows_of(step, spans) == [x_row, z_row]


def test_too_many_combinations_are_refused_not_dropped() -> None:
    planner = StepPlanner(2)
    for name in "xy":
        planner.add(name, SteeringPlan((segment(0, None, name),)))
    with pytest.raises(RuntimeError, match="raise --steering-rows"):
        planner.plan([TokenSpan("x", 0, 1), TokenSpan("y", 0, 1)])
