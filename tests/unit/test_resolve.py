"""From names to token positions and content."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from tests.unit.conftest import resolved
from vllm_steer.errors import ConfigError, RequestError
from vllm_steer.packs.pack import SteeringPack
from vllm_steer.packs.registry import PackRegistry
from vllm_steer.plan.binding import bind
from vllm_steer.plan.capacity import check_capacity
from vllm_steer.plan.message import decode_plan, encode_plan
from vllm_steer.plan.resolve import _segments, resolve
from vllm_steer.plan.steering_plan import Segment, SteeringPlan, Term
from vllm_steer.request.schema import SteeringRequest

PROMPT = 10


def plan(registry: PackRegistry, **fields: Any) -> SteeringPlan:
    return resolve(bind(SteeringRequest.model_validate(fields), registry), PROMPT)


@pytest.fixture
def registry(fears: SteeringPack, pack_at: Callable[..., SteeringPack]) -> PackRegistry:
    return PackRegistry([fears, pack_at("moods", {"calm": [1, 2], "New York": [1]}, seed=1)])


@pytest.mark.parametrize(
    ("positions", "ranges"),
    [
        ("all", [(0, None)]),
        ("prompt", [(0, PROMPT)]),
        ("generated", [(PROMPT, None)]),
        ("last_prompt", [(PROMPT - 1, PROMPT)]),
        ([[3, None]], [(3, None)]),
        ([[-4, None]], [(PROMPT - 4, None)]),
        ([[-4, -1], [0, 2]], [(0, 2), (PROMPT - 4, PROMPT - 1)]),
        ([[0, 5], [3, 8], [8, 9]], [(0, 9)]),
        ([[2, -3], [PROMPT + 2, PROMPT + 5]], [(2, PROMPT - 3), (PROMPT + 2, PROMPT + 5)]),
        ({"prompt": [[0, 2], [-3, None]]}, [(0, 2), (PROMPT - 3, PROMPT)]),
        ({"prompt": [[1, -1]]}, [(1, PROMPT - 1)]),
        # Longer than the prompt, or beyond it: cut at its ends.
        ({"prompt": [[0, 6], [-6, None]]}, [(0, PROMPT)]),
        ({"prompt": [[-99, 3], [4, 99], [50, 60]]}, [(0, 3), (4, PROMPT)]),
    ],
)
def test_positions(
    positions: Any, ranges: list[tuple[int, int | None]], registry: PackRegistry
) -> None:
    found = plan(registry, directions=[{"name": "calm"}], positions=positions)
    assert [(segment.start, segment.end) for segment in found.segments] == ranges


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        (
            [[-11, None]],
            "starts before the prompt, which has 10 tokens; start must be at least -10",
        ),
        ([[5, -6]], r"\[5, -6\] is empty for this prompt of 10 tokens"),
        ([[40, None]], "is never reached: prompt and answer have at most 32 tokens"),
        (
            {"prompt": [[12, None]]},
            r"{\"prompt\": \[\[12, null\]\]} has no position in this prompt",
        ),
    ],
)
def test_positions_that_the_prompt_does_not_have(
    positions: Any, message: str, registry: PackRegistry
) -> None:
    request = SteeringRequest.model_validate(
        {"directions": [{"name": "calm"}], "positions": positions}
    )
    with pytest.raises(RequestError, match=f"^steering.positions: .*{message}"):
        resolve(bind(request, registry), PROMPT, max_len=32)


def test_random_ranges_equal_a_sum_per_position(registry: PackRegistry) -> None:
    """The plain form: for each position, the terms whose ranges hold it."""
    generator = random.Random(0)
    names = ["fears/spiders", "moods/calm", "fears/New York"]
    for _ in range(100):
        choices = []
        for name in names:
            starts = [generator.randint(-PROMPT, 20) for _ in range(generator.randint(1, 4))]
            pairs = [[start, start + generator.randint(1, 9)] for start in starts]
            # An end of zero or more would count from the front, not from the prompt's end.
            pairs = [[a, None if a < 0 <= b else b] for a, b in pairs]
            choices.append({"name": name, "positions": pairs})
        found = plan(registry, directions=choices)
        for position in range(40):
            expected = sorted(
                registry.find(choice["name"]).digest
                for choice in choices
                if any(
                    (a + PROMPT if a < 0 else a)
                    <= position
                    < (1000 if b is None else b + PROMPT if b < 0 else b)
                    for a, b in choice["positions"]
                )
            )
            there = [
                s for s in found.segments if s.start <= position and position < (s.end or 1000)
            ]
            assert len(there) <= 1
            assert [t.digest for s in there for t in s.terms] == expected


def test_sums_where_directions_meet(registry: PackRegistry) -> None:
    found = plan(
        registry,
        directions=[{"name": "calm", "positions": "prompt"}, {"name": "spiders", "scale": -1.0}],
    )
    assert [(segment.start, segment.end, len(segment.terms)) for segment in found.segments] == [
        (0, PROMPT, 2),
        (PROMPT, None, 1),
    ]


def test_equal_content_has_equal_keys(registry: PackRegistry) -> None:
    one = plan(registry, directions=[{"name": "calm", "scale": 2.0}, {"name": "spiders"}])
    two = plan(registry, directions=[{"name": "fears/spiders"}, {"name": "moods/calm"}])
    assert one.segments[0].key == two.segments[0].key
    three = plan(registry, directions=[{"name": "calm", "scale": 2.5}, {"name": "spiders"}])
    four = plan(registry, directions=[{"name": "calm", "layers": [1]}, {"name": "spiders"}])
    assert len({plan.segments[0].key for plan in (one, three, four)}) == 3


def test_zero_scale_is_no_steering(registry: PackRegistry) -> None:
    assert plan(registry, directions=[{"name": "calm", "scale": 0.0}]).segments == ()


def test_defaults(registry: PackRegistry, fears: SteeringPack) -> None:
    (segment,) = plan(registry, directions=[{"name": "spiders"}]).segments
    assert segment == Segment(0, None, (Term(fears.digests["spiders"], 2.0, (1, 2, 3)),))


def test_message_round_trip(registry: PackRegistry) -> None:
    found = plan(
        registry, directions=[{"name": "calm", "positions": "prompt"}, {"name": "spiders"}]
    )
    assert decode_plan(encode_plan(found)) == found


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"directions": [{"name": "calmm"}]},
            "steering.directions.0.name: no loaded steering pack has a "
            "direction 'calmm'; did you mean 'calm'?",
        ),
        (
            {"directions": [{"name": "calm"}, {"name": "mods/calm"}]},
            "steering.directions.1.name: no steering pack 'mods' is loaded; did you mean 'moods'?",
        ),
        (
            {"directions": [{"name": "moods/calmer"}]},
            "has no direction 'calmer'; did you mean 'calm'?",
        ),
        (
            {"directions": [{"name": "New York"}]},
            "is in more than one loaded pack; name it as one of 'fears/New York', 'moods/New York'",
        ),
        (
            {"directions": [{"name": "spiders", "layers": [0, 3]}]},
            "has no vector for layers [0]; it has 1-3",
        ),
        ({"directions": [{"name": "spiders"}], "layers": [7]}, "has no vector for layers [7]"),
        ({"directions": [{"name": "calm", "scale": 1e30}]}, "|scale| must be at most 10000"),
        ({"directions": [{"name": "calm", "scale": -10001}]}, "the text was fluent up to 4"),
    ],
)
def test_refused(fields: dict[str, Any], message: str, registry: PackRegistry) -> None:
    with pytest.raises(RequestError) as refused:
        plan(registry, **fields)
    assert message in str(refused.value)


def test_two_packs_of_one_name(fears: SteeringPack) -> None:
    with pytest.raises(ConfigError, match="two steering packs are named 'fears'"):
        PackRegistry([fears, fears])


def test_more_sums_than_a_request_is_promised_are_refused(registry: PackRegistry) -> None:
    choices = [
        {"name": "calm", "positions": [[0, 4]]},
        {"name": "spiders", "positions": [[2, None]]},
    ]
    three = plan(registry, directions=choices)
    check_capacity(three, resolved(sums_per_request=3))
    with pytest.raises(RequestError, match="need 3 rows, and a request may use 2"):
        check_capacity(three, resolved(sums_per_request=2))


def test_how_many_ranges_there_may_be(registry: PackRegistry) -> None:
    """Admission pays for each of them, and every step of the engine."""
    apart = [[3 * n, 3 * n + 1] for n in range(64)]
    names = ["calm", "fears/spiders", "fears/New York"]

    def directions(count: int, positions: Any) -> list[dict[str, Any]]:
        layers = {"fears/New York": [0]}
        return [
            {"name": n, "scale": 1.0 + k, "positions": positions, "layers": layers.get(n, [1])}
            for k, n in enumerate((names * count)[:count])
        ]

    with pytest.raises(
        ValidationError, match="have 320 ranges of positions in total; the limit is 128"
    ):
        SteeringRequest.model_validate({"directions": directions(5, apart)})
    with pytest.raises(ValidationError, match="have 4096 ranges of positions in total"):
        SteeringRequest.model_validate({"directions": directions(64, None), "positions": apart})
    shifted = [
        each | {"positions": [[6 * n + 2 * number, 6 * n + 3 + 2 * number] for n in range(64)]}
        for number, each in enumerate(directions(2, apart))
    ]
    with pytest.raises(RequestError, match="split into 192 distinct ranges; the limit is 128"):
        plan(registry, directions=shifted)
    many = [*directions(64, "all"), *directions(1, apart)][1:]
    with pytest.raises(RequestError, match="more than 1024 terms in total"):
        plan(registry, directions=many)


@settings(deadline=None, max_examples=50)
@given(data=st.data())
def test_every_position_has_the_terms_whose_ranges_hold_it(data: st.DataObject) -> None:
    span = st.tuples(st.integers(0, 20), st.integers(1, 8) | st.none())
    chosen = data.draw(st.lists(st.lists(span, min_size=1, max_size=4), min_size=1, max_size=5))
    ranges = [[(a, None if n is None else a + n) for a, n in each] for each in chosen]
    terms = [Term(f"{n:064d}", 1.0 + n, (0,)) for n in range(len(ranges))]
    found = _segments(list(zip(ranges, terms, strict=True)), None)
    for position in range(32):
        wanted = [
            term
            for each, term in zip(ranges, terms, strict=True)
            if any(a <= position and (b is None or position < b) for a, b in each)
        ]
        here = [s for s in found if s.start <= position and (s.end is None or position < s.end)]
        assert len(here) <= 1
        assert sorted(here[0].terms if here else (), key=lambda t: t.order) == wanted
    for before, after in pairwise(found):
        assert before.end is not None
        assert before.end < after.start or before.key != after.key
