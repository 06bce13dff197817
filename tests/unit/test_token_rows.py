"""Rows by absolute position: chunks, resumption, sharing and reuse of rows."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from vllm_steer.engine.bank import BankShape, SteeringBank
from vllm_steer.engine.token_rows import TokenRowMapper, TokenRows
from vllm_steer.plan.steering_plan import Segment, SteeringPlan, Term

# Request, absolute position of its first token in the step, number of tokens.
Span = tuple[str, int, int]


def segment(start: int, end: int | None, name: str) -> Segment:
    return Segment(start, end, (Term(name, 1.0, (0,)),))


def whole(name: str) -> SteeringPlan:
    return SteeringPlan((segment(0, None, name),))


def plan(planner: TokenRowMapper, spans: Sequence[Span]) -> TokenRows:
    # As vLLM's, the arrays are longer than the batch.
    starts = np.array([*(start for _, start, _ in spans), 99], dtype=np.int32)
    lengths = np.array([*(length for _, _, length in spans), 99], dtype=np.int32)
    return planner.plan([request for request, _, _ in spans], starts, lengths)


def new_bank(num_tokens: int) -> SteeringBank:
    return SteeringBank(BankShape((0,), 16, 4, num_tokens), torch.float32, torch.device("cpu"))


def rows_of(step: TokenRows, spans: Sequence[Span], bank: SteeringBank | None = None) -> list[int]:
    """The row of each token, as the bank gives them; tokens after the step have row 0."""
    positions = torch.tensor([p for _, start, n in spans for p in range(start, start + n)])
    count = len(positions)
    if bank is None:
        bank = new_bank(count + 3)
        bank.set_rows(np.full(count + 3, 7, dtype=np.int32))
    bank.apply(step, positions)
    assert not bank.rows[count:].any()
    return bank.rows[:count].tolist()


def names(step: TokenRows) -> dict[str, int]:
    return {segment.terms[0].digest: row for row, segment in step.new}


def test_nothing_steered_costs_nothing() -> None:
    planner = TokenRowMapper(4)
    bank = new_bank(5)
    steps = [plan(planner, [("a", 0, 5)])]
    planner.add("b", whole("x"))
    steps.append(plan(planner, [("a", 0, 5)]))
    planner.add("c", SteeringPlan(()))
    planner.remove("b")
    steps.append(plan(planner, [("b", 5, 1)]))
    for step in steps:
        assert (step.new, step.rows, step.owners) == ((), None, None)
        # Not even a zero is written: only that would mend this.
        bank.rows[0] = 9
        bank.apply(step, torch.arange(5))
        assert bank.rows[0] == 9


def test_rows_follow_the_batch_order() -> None:
    planner = TokenRowMapper(4)
    planner.add("b", SteeringPlan((segment(0, 3, "x"), segment(3, None, "y"))))
    spans = [("a", 7, 2), ("b", 1, 4), ("c", 0, 1)]
    step = plan(planner, spans)
    rows = names(step)
    assert rows_of(step, spans) == [0, 0, rows["x"], rows["x"], rows["y"], rows["y"], 0]
    # The order changes, and nothing else.
    spans = [("c", 1, 1), ("b", 5, 1), ("a", 9, 1)]
    assert rows_of(plan(planner, spans), spans) == [0, rows["y"], 0]


def test_positions_decide_when_the_starts_are_optimistic() -> None:
    """Under speculative decoding the host counts drafts that were rejected."""
    planner = TokenRowMapper(8, starts_are_exact=False)
    planner.add("r", SteeringPlan((segment(4, 6, "x"), segment(6, None, "y"))))
    step = plan(planner, [("r", 8, 3)])
    rows = names(step)
    assert rows_of(step, [("r", 5, 3)]) == [rows["x"], rows["y"], rows["y"]]


def random_plan(generator: random.Random) -> SteeringPlan:
    edges = sorted(generator.sample(range(30), 2 * generator.randint(0, 3)))
    segments = [
        segment(start, end, generator.choice("uvwxyz"))
        for start, end in zip(edges[::2], edges[1::2], strict=True)
    ]
    if generator.random() < 0.5:
        segments.append(segment(30, None, generator.choice("uvwxyz")))
    return SteeringPlan(tuple(segments))


@pytest.mark.parametrize("exact", [True, False])
def test_random_steps_equal_the_plain_form(exact: bool) -> None:
    """Requests come, go, wait and change places; the plain form looks up every single token."""
    generator = random.Random(0)
    planner, bank = TokenRowMapper(13, starts_are_exact=exact), new_bank(200)
    plans: dict[str, SteeringPlan] = {}
    content: dict[int, str] = {0: ""}
    for number in range(600):
        if len(plans) < 8 or generator.random() < 0.3:
            request = f"r{generator.randint(0, 20)}"
            plans[request] = random_plan(generator)
            planner.add(request, plans[request])
        if generator.random() < 0.3:
            gone = generator.choice(sorted(plans))
            del plans[gone]
            planner.remove(gone)
        # As many as the rows are promised to: four requests of up to three sums.
        batch = generator.sample([*plans, f"plain{number}"], min(4, len(plans)))
        decoding = generator.random() < 0.5
        spans = [
            (r, generator.randint(0, 40), 1 if decoding else generator.randint(1, 9)) for r in batch
        ]
        step = plan(planner, spans)
        content |= {row: s.terms[0].digest for row, s in step.new}
        expected = [
            next(
                (
                    s.terms[0].digest
                    for s in (plans[r].segments if r in plans else ())
                    if s.start <= position and (s.end is None or position < s.end)
                ),
                "",
            )
            for r, start, length in spans
            for position in range(start, start + length)
        ]
        assert [content[row] for row in rows_of(step, spans, bank)] == expected


def test_any_chunking_gives_the_rows_of_one_chunk() -> None:
    """Prefill in chunks, preemption and recomputation are nothing but other spans."""
    generator = random.Random(0)
    content = SteeringPlan((segment(2, 11, "x"), segment(11, 17, "y"), segment(17, None, "z")))
    one = TokenRowMapper(8)
    one.add("r", content)
    everything = [("r", 0, 30)]
    expected = plan(one, everything)
    known = {row: name for name, row in names(expected).items()} | {0: ""}
    for _ in range(50):
        planner, seen, found = TokenRowMapper(8), [], {0: ""}
        planner.add("r", content)
        position = 0
        while position < 30:
            length = min(generator.randint(1, 9), 30 - position)
            spans = [("r", position, length)]
            step = plan(planner, spans)
            found |= {row: name for name, row in names(step).items()}
            seen += [found[row] for row in rows_of(step, spans)]
            position += length
        assert seen == [known[row] for row in rows_of(expected, everything)]


def test_equal_combinations_share_a_row() -> None:
    planner = TokenRowMapper(3)
    for name in "abcd":
        planner.add(name, whole("x" if name < "c" else "y"))
    spans = [(name, 4, 1) for name in "abcd"]
    step = plan(planner, spans)
    rows = rows_of(step, spans)
    assert rows[0] == rows[1] != rows[2] == rows[3]
    assert len(step.new) == 2
    assert plan(planner, [(name, 5, 1) for name in "abcd"]).new == ()


def test_the_row_idle_for_longest_is_given_away() -> None:
    planner = TokenRowMapper(4)
    for name in "xyz":
        planner.add(name, whole(name))
    rows = names(plan(planner, [(name, 0, 1) for name in "xyz"]))
    for name in "yx":
        planner.remove(name)
    planner.add("w", whole("w"))
    step = plan(planner, [("w", 0, 1), ("z", 1, 1)])
    assert names(step) == {"w": rows["y"]}
    # A combination that comes back finds its sum.
    planner.add("x again", whole("x"))
    spans = [("x again", 0, 1), ("z", 2, 1)]
    step = plan(planner, spans)
    assert step.new == ()
    assert rows_of(step, spans) == [rows["x"], rows["z"]]


def test_a_waiting_request_loses_its_row_and_gets_one_again() -> None:
    planner = TokenRowMapper(3)
    for name in "xyz":
        planner.add(name, whole(name))
    plan(planner, [("x", 0, 1), ("y", 0, 1)])
    # y was preempted; it keeps its entry without being in the batch.
    plan(planner, [("x", 1, 1), ("z", 0, 1)])
    step = plan(planner, [("x", 2, 1), ("y", 1, 1)])
    assert list(names(step)) == ["y"]
    assert len(set(rows_of(step, [("x", 2, 1), ("y", 1, 1)]))) == 2


def test_too_many_combinations_are_refused_not_dropped() -> None:
    planner = TokenRowMapper(2)
    for name in "xy":
        planner.add(name, whole(name))
    with pytest.raises(RuntimeError, match="raise --steering-rows"):
        plan(planner, [("x", 0, 1), ("y", 0, 1)])


def test_equal_rows_are_sent_once() -> None:
    bank = new_bank(8)
    bank.set_rows(np.array([1, 2, 3], dtype=np.int32))
    # Only a second sending would mend this.
    bank.rows[1] = 9
    bank.set_rows(np.array([1, 2, 3], dtype=np.int32))
    assert bank.rows.tolist() == [1, 9, 3, 0, 0, 0, 0, 0]
    bank.set_rows(np.array([1, 2], dtype=np.int32))
    assert bank.rows.tolist() == [1, 2, 0, 0, 0, 0, 0, 0]
    bank.clear_rows()
    assert not bank.rows.any()
