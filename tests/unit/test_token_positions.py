"""Positions by token id: requests, plans, rows on the device, keys of the prefix cache, receipts."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm.exceptions import VLLMValidationError

from tests.unit.conftest import plan, resolved
from tests.unit.front_end import VOCABULARY, started
from vllm_steer.engine.bank import BankShape, SteeringBank
from vllm_steer.engine.intake import check_plan
from vllm_steer.engine.prefix_cache import steered_extra_keys
from vllm_steer.engine.token_rows import TokenRowMapper
from vllm_steer.engine.triggers import MatchWatch
from vllm_steer.errors import RequestError
from vllm_steer.packs.pack import SteeringPack
from vllm_steer.packs.registry import PackRegistry
from vllm_steer.packs.store import PackStore
from vllm_steer.plan.capacity import check_capacity
from vllm_steer.plan.message import decode_plan, encode_plan
from vllm_steer.plan.steering_plan import SteeringPlan, count_matched
from vllm_steer.request.positions import (
    MAX_TOKEN_IDS,
    absolute_positions,
    parse_positions,
    plain_positions,
)
from vllm_steer.request.schema import PLAN_KEY, SteeringRequest, parse
from vllm_steer.request.stop_tokens import MAX_TRIGGERS
from vllm_steer.request.token_matches import TokenMatch, match_states
from vllm_steer.serving.admission import Wanted
from vllm_steer.serving.receipt import LimitedPlan, Receipt

# Prompts of ``plan``.
PROMPT = 10
BLOCK = 16
CPU = torch.device("cpu")


@pytest.fixture
def registry(pack_at: Callable[..., SteeringPack]) -> PackRegistry:
    return PackRegistry([pack_at("p", {"a": [0, 1], "b": [0, 1], "c": [0]})])


def one(positions: Any, **fields: Any) -> dict[str, Any]:
    return {"directions": [{"name": "a", "positions": positions}]} | fields


@pytest.mark.parametrize(
    "positions",
    [
        {"tokens": [3]},
        {"tokens": [1, 3], "within": "generated"},
        {"from_tokens": [1], "within": [[2, None], [-4, -1]]},
        {"from_tokens": [1], "within": {"generated": [0, 7]}},
        {"tokens": [5], "within": {"prompt": [[1, None]]}},
    ],
)
def test_positions_are_written_as_they_are_read(positions: Any) -> None:
    request = parse({"steering": one(positions)})
    assert request is not None
    assert request.model_dump()["directions"][0]["positions"] == positions
    again = SteeringRequest.model_validate(one(plain_positions(request.directions[0].positions)))
    assert again == request


@pytest.mark.parametrize(
    "positions",
    [
        {"tokens": []},
        {"tokens": list(range(MAX_TOKEN_IDS + 1))},
        {"tokens": [-1]},
        {"tokens": [2**31]},
        {"tokens": [True]},
        {"tokens": ["a"]},
        {"tokens": [1.0]},
        {"tokens": 3},
        {"tokens": {"tokens": [3]}},
        {"tokens": [1], "from_tokens": [2]},
        {"tokens": [1], "prompt": [[0, 1]]},
        {"tokens": [1], "within": None},
        {"tokens": [1], "within": {"tokens": [2]}},
        {"within": "prompt"},
    ],
)
def test_malformed_positions_are_refused(positions: Any) -> None:
    with pytest.raises(RequestError, match=r"steering.directions.0.positions: must be "):
        parse({"steering": one(positions)})


def test_positions_of_one_prompt_are_absolute() -> None:
    for within, pairs in (("generated", [[7, None]]), ({"prompt": [[-2, None]]}, [[5, 7]])):
        for key in ("tokens", "from_tokens"):
            positions = parse_positions({key: [3], "within": within})
            assert absolute_positions(positions, 7) == {key: [3], "within": pairs}
        assert absolute_positions(parse_positions(within), 7) == pairs


def test_reads_have_no_token_ids() -> None:
    with pytest.raises(RequestError, match=r"steering.read.0.at: must be "):
        parse({"steering": {"read": [{"name": "a", "at": {"tokens": [1]}}]}})


def test_token_ids_are_the_models(pack_at: Callable[..., SteeringPack]) -> None:
    admission = started(pack_at("p", {"a": [0]}))
    for fields, field in (
        (one({"tokens": [1, VOCABULARY]}), "steering.directions.0.positions"),
        (
            {"directions": [{"name": "a"}], "positions": {"from_tokens": [VOCABULARY]}},
            "steering.positions",
        ),
        (one("all", until_token_ids=[VOCABULARY]), "steering.until_token_ids"),
    ):
        request = SteeringRequest.model_validate(fields)
        with pytest.raises(
            VLLMValidationError, match=f"{field}: {VOCABULARY} is no token id .* 499"
        ):
            admission.admit(Wanted(request), PROMPT)
    request = SteeringRequest.model_validate(one({"tokens": [VOCABULARY - 1]}))
    assert admission.admit(Wanted(request), PROMPT).receipt.plan.matches


def test_states_are_found_token_by_token() -> None:
    tokens = [7, 1, 7, 2, 1, 9]
    matches = [
        TokenMatch(0, (7,), onward=False),
        TokenMatch(1, (7,), onward=True),
        TokenMatch(2, (1, 9), onward=False),
        TokenMatch(5, (2,), onward=True),
    ]
    found = match_states(matches, tokens)
    assert [[bool(state & 1 << k) for state in found] for k in range(4)] == [
        [True, False, True, False, False, False],
        [False, False, True, True, True, True],
        [False, False, False, False, True, True],
        [False] * 6,
    ]


def test_a_plan_travels_and_limits_hold(registry: PackRegistry) -> None:
    def choices(count: int, **fields: Any) -> list[dict[str, Any]]:
        return [
            {"name": "a", "scale": 1.0 + k, "positions": {"tokens": [k]}} | fields
            for k in range(count)
        ]

    found = plan(registry, *choices(3), {"name": "b", "positions": "all"})
    assert decode_plan(encode_plan(found)) == found
    assert (len(found.entries), len(found.sums)) == (8, 8)
    with pytest.raises(RequestError, match="they need 8 rows, .* choices of token ids"):
        check_capacity(found, resolved(sums_per_request=7))
    with pytest.raises(RequestError, match="5 different choices of token ids, and the limit is 4"):
        plan(registry, *choices(5))
    # Equal choices are one, and what nothing is added to takes no row.
    assert len(plan(registry, *choices(1), *choices(1)).entries) == 1
    ranges = [[2 * k, 2 * k + 1] for k in range(20)]
    with pytest.raises(RequestError, match="300 combinations; the limit is 128"):
        plan(
            registry,
            *(
                choice | {"positions": choice["positions"] | {"within": ranges}}
                for choice in choices(4)
            ),
        )


def test_the_engine_checks_what_it_is_sent(registry: PackRegistry) -> None:
    store, config = PackStore(registry), resolved()
    good = plan(registry, {"name": "a", "positions": {"tokens": [1]}})
    check_plan(good, config, store, "float32")
    (segment,) = good.segments
    for match in (
        TokenMatch(-1, (1,), onward=True),
        TokenMatch(0, (), onward=True),
        TokenMatch(0, (2**31,), onward=False),
        TokenMatch(0, tuple(range(MAX_TOKEN_IDS + 1)), onward=False),
    ):
        terms = tuple(replace(term, match=match) for term in segment.terms)
        bad = SteeringPlan((type(segment)(0, None, terms),))
        with pytest.raises(RequestError, match="choices of tokens must be"):
            check_plan(bad, config, store, "float32")


def expected(found: SteeringPlan, tokens: Sequence[int]) -> list[frozenset[tuple[str, float]]]:
    """What acts on each token, looked up one by one."""
    acting = []
    for at, token in enumerate(tokens):
        here: list[tuple[str, float]] = []
        for segment in found.segments:
            if not segment.start <= at or (segment.end is not None and at >= segment.end):
                continue
            for term in segment.terms:
                match = term.match
                if match is None:
                    holds = True
                elif match.onward:
                    holds = any(each in match.tokens for each in tokens[match.origin : at + 1])
                else:
                    holds = token in match.tokens
                if holds:
                    here.append((term.digest, term.scale))
        acting.append(frozenset(here))
    return acting


def random_request(rng: random.Random) -> list[dict[str, Any]]:
    """Up to three directions, of which some have token ids."""
    choices = []
    for number, name in enumerate(rng.sample("abc", rng.randint(1, 3))):
        start = rng.randrange(PROMPT + 5)
        within = rng.choice(["all", "prompt", "generated", [[start, start + rng.randint(1, 20)]]])
        ids = rng.sample(range(12), rng.choice([1, 2, 12]))
        positions = rng.choice(
            [within, {"tokens": ids, "within": within}, {"from_tokens": ids, "within": within}]
        )
        choices.append({"name": name, "scale": 1.0 + number, "layers": [0], "positions": positions})
    return choices


class Steered:
    """Requests of one worker, whose rows are found step by step."""

    def __init__(self, exact: bool) -> None:
        self.planner = TokenRowMapper(65, starts_are_exact=exact)
        self.watch = MatchWatch(CPU)
        self.bank = SteeringBank(BankShape((0,), 65, 4, 256), torch.float32, CPU)
        self.content: dict[int, frozenset[tuple[str, float]]] = {0: frozenset()}

    def add(self, request: str, found: SteeringPlan, tokens: Sequence[int]) -> None:
        self.planner.add(request, found)
        self.watch.remove(request)
        if found.matches:
            self.watch.add(request, found.matches, tokens)

    def step(
        self, spans: Sequence[tuple[str, int, Sequence[int]]], optimism: int = 0
    ) -> list[list[frozenset[tuple[str, float]]]]:
        """What acts on the tokens of each span: request, position of the first token, tokens."""
        names = [name for name, _, _ in spans]
        lengths = np.array([len(tokens) for _, _, tokens in spans])
        starts = np.array([start + optimism for _, start, _ in spans])
        positions = torch.tensor([s + k for _, s, tokens in spans for k in range(len(tokens))])
        tokens = torch.tensor([token for _, _, each in spans for token in each])
        states = self.watch.states(names, lengths, positions, tokens)
        planned = self.planner.plan(names, starts, lengths)
        for row, segment in planned.new:
            self.content[row] = frozenset((t.digest, t.scale) for t in segment.terms)
        self.bank.apply(planned, positions, states)
        rows = iter(self.bank.rows[: len(tokens)].tolist())
        return [[self.content[next(rows)] for _ in each] for _, _, each in spans]


@pytest.mark.parametrize("speculative", [False, True])
def test_any_schedule_gives_what_tokens_decide(registry: PackRegistry, speculative: bool) -> None:
    """Chunks, prefixes from the cache, preemption, and drafts of which some are rejected."""
    rng = random.Random(0)
    for _ in range(150):
        steered, truth, done, wanted = Steered(not speculative), {}, {}, {}
        for number in range(rng.randint(1, 4)):
            name = f"r{number}"
            found = plan(registry, *random_request(rng))
            truth[name] = [rng.randrange(12) for _ in range(PROMPT + 30)]
            steered.add(name, found, truth[name][:PROMPT])
            done[name] = rng.choice([0, 0, 4, PROMPT - 1])
            wanted[name] = expected(found, truth[name])
            if rng.random() < 0.2:
                # One without any token ids beside it.
                steered.add("plain", plan(registry, {"name": "a", "layers": [0]}), ())
        while any(position < PROMPT + 20 for position in done.values()):
            spans, accepted = [], {}
            left = sorted(name for name, position in done.items() if position < PROMPT + 20)
            for name in rng.sample(left, rng.randint(1, len(left))):
                start = done[name]
                if rng.random() < 0.05:
                    # Preempted: all is computed again, or from what the cache still has.
                    start = rng.randrange(min(start, PROMPT) + 1)
                if start < PROMPT:
                    count = rng.randint(1, PROMPT - start)
                    tokens, keep = truth[name][start : start + count], count
                else:
                    count = rng.randint(1, 4) if speculative else 1
                    keep = rng.randint(1, count)
                    drafts = [rng.randrange(12) for _ in range(count - keep)]
                    tokens = truth[name][start : start + keep] + drafts
                spans.append((name, start, tokens))
                accepted[name] = start, keep
            found_rows = steered.step(spans, optimism=3 if speculative else 0)
            for (name, start, _), acting in zip(spans, found_rows, strict=True):
                keep = accepted[name][1]
                assert acting[:keep] == wanted[name][start : start + keep]
                done[name] = start + keep


def test_a_resumed_request_knows_what_it_said(registry: PackRegistry) -> None:
    """Model Runner V2 adds it anew, with its answer so far, and the cache may hold the token that counts."""
    found = plan(registry, {"name": "a", "positions": {"from_tokens": [5], "within": "generated"}})
    steered = Steered(exact=True)
    tokens = [5] * PROMPT + [1, 5, 2, 3]
    steered.add("r", found, tokens)
    ((first, second),) = steered.step([("r", PROMPT + 2, tokens[PROMPT + 2 :])])
    assert first == second != frozenset()
    steered.add("r", found, tokens[: PROMPT + 1])
    ((first, second),) = steered.step([("r", PROMPT + 2, [2, 3])])
    assert first == second == frozenset()


def test_more_ids_and_more_requests_find_room(registry: PackRegistry) -> None:
    steered, many = Steered(exact=True), list(range(100, 100 + MAX_TOKEN_IDS))
    few = plan(registry, {"name": "a", "positions": {"tokens": [1]}})
    steered.add("few", few, ())
    steered.add("many", plan(registry, {"name": "b", "positions": {"tokens": many}}), ())
    for number in range(20):
        steered.add(f"r{number}", few, ())
    spans = [("few", 0, [1, 100]), ("many", 0, [1, many[-1]]), ("r19", 3, [1, 2])]
    acting = steered.step(spans)
    assert [[bool(each) for each in row] for row in acting] == [
        [True, False],
        [False, True],
        [True, False],
    ]
    assert len(many) > MAX_TRIGGERS


def request_of(found: SteeringPlan, tokens: list[int]) -> Any:
    params = SimpleNamespace(extra_args={PLAN_KEY: encode_plan(found)})
    return SimpleNamespace(sampling_params=params, all_token_ids=tokens)


def test_keys_are_equal_exactly_where_changes_are(registry: PackRegistry) -> None:
    """Of two requests with the same tokens, whatever ids and ranges they name."""
    extra_keys = steered_extra_keys(lambda request, start, end: [])
    rng, counts = random.Random(1), {True: 0, False: 0}
    for _ in range(400):
        tokens = [rng.randrange(12) for _ in range(4 * BLOCK)]
        pair = []
        for _ in range(2):
            choices = random_request(rng)
            for choice in choices:
                choice["scale"] = 1.0
            found = plan(registry, *choices[:2])
            request = request_of(found, tokens)
            pair.append((expected(found, tokens), request))
        for start in range(0, len(tokens), BLOCK):
            end = start + BLOCK
            same = pair[0][0][start:end] == pair[1][0][start:end]
            keys = [set(extra_keys(request, start, end)) for _, request in pair]
            if not same:
                assert keys[0] != keys[1]
            unchanged = [not any(acting[start:end]) for acting, _ in pair]
            assert [not each for each in keys] == unchanged
            counts[same] += 1
    assert min(counts.values()) > 100


def test_other_ids_share_blocks_that_they_do_not_change(registry: PackRegistry) -> None:
    extra_keys = steered_extra_keys(lambda request, start, end: [])
    tokens = [1, 2, 3] * BLOCK
    first, second = (
        request_of(plan(registry, {"name": "a", "positions": {"tokens": ids}}), tokens)
        for ids in ([2], [2, 11])
    )
    for start in range(0, len(tokens), BLOCK):
        assert extra_keys(first, start, start + BLOCK) == extra_keys(second, start, start + BLOCK)


def test_receipts_count_the_tokens_that_were_steered(registry: PackRegistry) -> None:
    found = plan(
        registry,
        {"name": "a", "positions": {"tokens": [7]}},
        {"name": "b", "positions": {"from_tokens": [9], "within": "generated"}},
    )
    names = {registry.find(name).digest: f"p/{name}" for name in "ab"}
    receipt = Receipt.of(LimitedPlan(found, 0.2), names, PROMPT)
    prompt, answer = [7, 9, 1, 1, 1, 1, 1, 1, 1, 1], [1, 7, 9, 2, 7]
    receipt.prompt_tokens = prompt
    for number, token in enumerate(answer):
        receipt.count(0, [token], number)
    # The last token of an answer does not go through the model.
    assert receipt.tokens_steered() == 1 + 1 + 2
    assert count_matched(found, [*prompt, *answer]) == 5
    told = receipt.to_json()
    assert [each.get("tokens", each.get("from_tokens")) for each in told["directions"]] in (
        [[7], [9]],
        [[9], [7]],
    )
    assert {each.get("origin") for each in told["directions"]} == {None, PROMPT}
