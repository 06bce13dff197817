"""Strength over the generated tokens: the factor of every token, by its absolute position alone."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.unit.conftest import resolved
from vllm_steer.engine.bank import BankShape, SteeringBank
from vllm_steer.engine.blocks import hook_blocks
from vllm_steer.engine.row_values import row_values
from vllm_steer.engine.token_rows import TokenRowMapper
from vllm_steer.errors import RequestError
from vllm_steer.packs.pack import SteeringPack
from vllm_steer.packs.registry import PackRegistry
from vllm_steer.plan.binding import bind
from vllm_steer.plan.capacity import check_capacity
from vllm_steer.plan.dose import relative_dose
from vllm_steer.plan.message import decode_plan, encode_plan
from vllm_steer.plan.resolve import resolve
from vllm_steer.plan.steering_plan import SteeringPlan
from vllm_steer.request.schema import SteeringRequest, parse
from vllm_steer.serving.policy import Policy

RAMP = {"start": 0.5, "end": -1.0, "tokens": 8}
DECAY = {"start": 2.0, "end": 0.0, "tokens": 5, "shape": "exponential"}


@pytest.fixture
def registry(pack_at: Callable[..., SteeringPack]) -> PackRegistry:
    return PackRegistry([pack_at("p", {"a": [0, 1], "b": [0, 1]})])


def plan(registry: PackRegistry, prompt_len: int, **fields: Any) -> SteeringPlan:
    request = parse({"steering": fields})
    assert request is not None
    return resolve(bind(request, registry), prompt_len)


def expected(schedule: dict[str, Any] | None, generated: int) -> float:
    if schedule is None:
        return 1.0
    passed = max(generated, 0) / schedule["tokens"]
    if schedule.get("shape") == "exponential":
        return schedule["end"] + (schedule["start"] - schedule["end"]) * math.exp(-passed)
    return schedule["start"] + (schedule["end"] - schedule["start"]) * min(passed, 1.0)


@pytest.mark.parametrize("on_host", [True, False])
def test_factors_do_not_depend_on_how_tokens_are_scheduled(
    on_host: bool, registry: PackRegistry
) -> None:
    """Prompts in chunks, answers token by token, recomputation, and other requests beside them."""
    rng = random.Random(0)
    cases: dict[str, tuple[int, dict[str, Any] | None]] = {
        "ramp": (5, RAMP),
        "decay": (9, DECAY),
        "constant": (3, None),
        "unsteered": (4, None),
    }
    planner = TokenRowMapper(8, 2, starts_are_exact=on_host)
    bank = SteeringBank(BankShape((0, 1), 8, 16, 64, rank=2), torch.float32, torch.device("cpu"))
    for name, (prompt_len, schedule) in cases.items():
        if name != "unsteered":
            fields = {"schedule": schedule} if schedule else {}
            directions = [{"name": "a", "scale": 2.0, "positions": [[1, None]]}]
            planner.add(name, plan(registry, prompt_len, directions=directions, **fields))
    for _ in range(200):
        batch = rng.sample(list(cases), rng.randint(1, 4))
        spans = [(name, rng.randint(0, 20), rng.randint(1, 9)) for name in batch]
        positions = [p for _, start, n in spans for p in range(start, start + n)]
        owners = [name for name, _, n in spans for _ in range(n)]
        starts = np.array([start for _, start, _ in spans])
        lengths = np.array([n for *_, n in spans])
        step = planner.plan(batch, starts, lengths)
        bank.apply(step, torch.tensor(positions))
        for token, (name, position) in enumerate(zip(owners, positions, strict=True)):
            prompt_len, schedule = cases[name]
            if name == "unsteered" or position < 1:
                assert bank.rows[token] == 0
                continue
            assert bank.rows[token] > 0
            wanted = expected(schedule, position - prompt_len)
            assert bank.factors[token].tolist() == pytest.approx([wanted] * 3, abs=1e-6)
        assert not bank.rows[len(owners) :].any()
        assert (bank.factors[len(owners) :] == 1).all()


def test_one_row_serves_all_schedules_and_cache_keys_tell_them_apart(
    registry: PackRegistry,
) -> None:
    directions = [{"name": "a", "scale": 2.0}]
    plans = [
        plan(registry, prompt_len, directions=directions, **fields)
        for prompt_len, fields in [
            (5, {}),
            (5, {"schedule": RAMP}),
            (6, {"schedule": RAMP}),
            (5, {"schedule": DECAY}),
            (5, {"schedule": RAMP | {"shape": "exponential"}}),
        ]
    ]
    assert len({p.segments[0].row_key for p in plans}) == 1
    assert len({p.segments[0].key for p in plans}) == len(plans)
    assert [decode_plan(encode_plan(p)) for p in plans] == plans


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"schedule": {"start": 1.0, "end": 0.0}}, "schedule.tokens:"),
        ({"schedule": RAMP | {"over": 3}}, "schedule.over: unknown key"),
        ({"schedule": RAMP | {"shape": "cubic"}}, "schedule.shape:"),
        (
            {"directions": [{"name": "a", "op": "clamp", "scale": 1.0}], "schedule": RAMP},
            "op 'clamp' has no strength to schedule",
        ),
        (
            {"directions": [{"name": "a", "restore_norm": True}], "schedule": RAMP},
            "restore_norm has no strength",
        ),
        (
            {"directions": [{"name": "a", "scale": 1e3}], "schedule": RAMP | {"end": -50.0}},
            r"\|scale\| must be at most 200 with this schedule",
        ),
    ],
)
def test_refused_schedules(fields: dict[str, Any], message: str, registry: PackRegistry) -> None:
    with pytest.raises(RequestError, match=message):
        plan(registry, 5, **({"directions": [{"name": "a"}]} | fields))


def test_the_additive_tier_has_one_strength(registry: PackRegistry) -> None:
    found = plan(registry, 5, directions=[{"name": "a"}], schedule=RAMP)
    with pytest.raises(RequestError, match="schedules need .*--steering-ops affine"):
        check_capacity(found, resolved())
    check_capacity(found, resolved(ops="affine"))


# Additions and other forms, each with its schedule; together of rank 4.
OF_THEIR_OWN: list[dict[str, Any]] = [
    {"name": "a", "scale": 2.0},
    {"name": "b", "scale": 3.0, "schedule": RAMP},
    {"name": "a", "scale": 0.5, "op": "ablate", "schedule": DECAY, "layers": [1]},
    {"name": "b", "scale": 40.0, "op": "rotate", "plane": "a"},
    {"name": "b", "scale": 1.0},
]


@pytest.mark.parametrize("on_host", [True, False])
@pytest.mark.parametrize(
    "directions", [OF_THEIR_OWN, [OF_THEIR_OWN[0] | {"schedule": DECAY}, OF_THEIR_OWN[1]]]
)
def test_directions_that_meet_have_schedules_of_their_own(
    directions: list[dict[str, Any]], on_host: bool, registry: PackRegistry
) -> None:
    """What the block returns is the sum of what each direction would do alone, by its own factor."""
    prompt_len, count = 5, 30
    planner = TokenRowMapper(8, 4, starts_are_exact=on_host)
    positions = torch.arange(count)
    alone = [
        plan(registry, prompt_len, directions=[one | {"schedule": None}]) for one in directions
    ]
    together = plan(registry, prompt_len, directions=directions)
    stream = torch.randn(count, 16, generator=torch.Generator().manual_seed(0))

    def change(found: SteeringPlan, layer: int) -> torch.Tensor:
        block, bank = nn.Identity(), new_bank()
        hook_blocks([(layer, block)], bank)
        planner.add("request", decode_plan(encode_plan(found)))
        step = planner.plan(["request"], np.array([0]), np.array([count]))
        for row, segment in step.new:
            bank.write_row(row, row_values(segment, bank.index, 4, 16, registry.by_digest))
        bank.apply(step, positions)
        planner.remove("request")
        return block(stream.clone()) - stream

    for layer in (0, 1):
        wanted = torch.zeros_like(stream)
        for one, found in zip(directions, alone, strict=True):
            factors = [expected(one.get("schedule"), p - prompt_len) for p in range(count)]
            wanted += torch.tensor(factors)[:, None] * change(found, layer)
        torch.testing.assert_close(change(together, layer), wanted, atol=1e-5, rtol=1e-5)


def new_bank() -> SteeringBank:
    return SteeringBank(BankShape((0, 1), 8, 16, 64, rank=4), torch.float32, torch.device("cpu"))


def test_schedules_of_their_own_take_rank(registry: PackRegistry) -> None:
    found = plan(registry, 5, directions=OF_THEIR_OWN)
    with pytest.raises(RequestError, match="different schedules.* total rank of 4, .*limit is 2"):
        check_capacity(found, resolved(ops="affine"))
    check_capacity(found, resolved(ops="affine", rank=4))
    again = plan(registry, 9, directions=OF_THEIR_OWN[::-1])
    assert again.segments[0].row_key == found.segments[0].row_key
    assert again.segments[0].key != found.segments[0].key
    # One row serves both ways round, and another one what has a single schedule.
    first, second = {"name": "a", "scale": 2.0}, {"name": "b", "scale": 3.0}
    scheduled = {"schedule": RAMP}
    pairs = [[first, second | scheduled], [first | scheduled, second], [first, second]]
    segments = [plan(registry, 5, directions=pair).segments[0] for pair in pairs]
    assert segments[0].row_key == segments[1].row_key != segments[2].row_key
    assert len({segment.key for segment in segments}) == 3


def test_the_dose_is_that_of_the_largest_factor(registry: PackRegistry) -> None:
    """A unit vector at two layers beside a residual stream of norm 10."""
    asked = {"directions": [{"name": "a", "scale": 2.0}]}
    assert relative_dose(plan(registry, 5, **asked), registry) == pytest.approx(0.4)
    found = plan(registry, 5, **asked, schedule={"start": 0.0, "end": -30.0, "tokens": 4})
    assert relative_dose(found, registry) == pytest.approx(12.0)


def test_ranges_of_generated_tokens(registry: PackRegistry) -> None:
    found = plan(registry, 5, directions=[{"name": "a"}], positions={"generated": [2, 6]})
    assert [(s.start, s.end) for s in found.segments] == [(7, 11)]
    found = plan(registry, 5, directions=[{"name": "a"}], positions={"generated": [0, None]})
    assert [(s.start, s.end) for s in found.segments] == [(5, None)]
    for wrong in ({"generated": [-1, 3]}, {"generated": [3, 3]}, {"answer": [0, 3]}, {}):
        with pytest.raises(RequestError, match="positions"):
            plan(registry, 5, directions=[{"name": "a"}], positions=wrong)


def test_a_policy_keeps_them(tmp_path: Any) -> None:
    steering = {
        "directions": [{"name": "a", "op": "ablate"}],
        "positions": {"generated": [0, 4]},
        "schedule": RAMP | {"shape": "linear"},
    }
    request = SteeringRequest.model_validate(steering)
    again = Policy.model_validate_json(Policy(aliases={"x": request}).model_dump_json())
    assert again.aliases["x"] == request
