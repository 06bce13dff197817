"""What a request is to be steered by, where the engine takes it in: ``LLM``, an embedded engine, token-in routes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from vllm import PoolingParams, SamplingParams
from vllm.exceptions import VLLMValidationError

from tests.unit.front_end import started
from vllm_steer.packs.pack import SteeringPack
from vllm_steer.plan.message import plan_of
from vllm_steer.request.schema import PLAN_KEY, SteeringRequest, steering_keys
from vllm_steer.serving import request_hooks, request_plan
from vllm_steer.serving.admission import UNSTEERED, Admission, Wanted
from vllm_steer.serving.http_context import HttpContext, current_http_context
from vllm_steer.serving.policy import Policy
from vllm_steer.serving.request_hooks import check_sampling, plan_inputs
from vllm_steer.serving.request_plan import admitted, beam_search
from vllm_steer.serving.request_tracking import _plan

SPIDERS: dict[str, Any] = {"directions": [{"name": "fears/spiders", "scale": 2.0}]}
LATE = SPIDERS | {"positions": "generated"}
TOKENS = [5, 6, 7]


@pytest.fixture
def admission(fears: SteeringPack) -> Admission:
    return started(fears)


@pytest.fixture
def http_context() -> Iterator[HttpContext]:
    found = HttpContext("/invocations")
    token = current_http_context.set(found)
    yield found
    current_http_context.reset(token)


def taken_in(admission: Admission, params: Any) -> Any:
    """The engine's request that comes of some parameters."""

    def process_inputs(self: Any, request_id: str, prompt: Any, params: Any) -> Any:
        return SimpleNamespace(
            prompt_embeds=None, prompt_token_ids=TOKENS, sampling_params=params.clone()
        )

    front_end = SimpleNamespace(_vllm_steer_admission=admission)
    return plan_inputs(process_inputs)(front_end, "1", TOKENS, params)


def steered(admission: Admission, params: Any) -> list[str]:
    plan = plan_of(taken_in(admission, params).sampling_params)
    return sorted(plan.digests) if plan is not None else []


def test_the_default_steers_what_names_nothing(admission: Admission, fears: SteeringPack) -> None:
    digest = fears.digests["spiders"]
    assert steered(admission, SamplingParams()) == []
    admission.policy = Policy(default=SteeringRequest.model_validate(SPIDERS))
    assert steered(admission, SamplingParams()) == [digest]
    assert steered(admission, SamplingParams(extra_args={"other": 1})) == [digest]
    assert steered(admission, SamplingParams(extra_args={"steering": "none"})) == []
    own = {"steering": {"directions": [{"name": "New York"}]}}
    assert steered(admission, SamplingParams(extra_args=own)) == [fears.digests["New York"]]
    assert steered(admission, PoolingParams(task="embed")) == []
    # What was decided before is not decided again.
    assert steered(admission, SamplingParams(extra_args={PLAN_KEY: UNSTEERED, "a": 1})) == []


@pytest.mark.parametrize("value", [None, b"", [], {}, "unsteered", 1])
def test_no_client_decides_in_the_place_of_admission(value: Any, admission: Admission) -> None:
    admission.policy = Policy(default=SteeringRequest.model_validate(SPIDERS))
    with pytest.raises(VLLMValidationError, match="is internal; send 'steering'"):
        steered(admission, SamplingParams(extra_args={PLAN_KEY: value}))


def test_the_steps_of_a_beam_search_that_wants_no_steering_get_no_default(
    admission: Admission,
) -> None:
    admission.policy = Policy(default=SteeringRequest.model_validate(SPIDERS))
    token = beam_search.set(True)
    try:
        assert steered(admission, SamplingParams()) == []
    finally:
        beam_search.reset(token)


def test_an_alias_steers_whatever_its_route_is(
    admission: Admission, fears: SteeringPack, http_context: HttpContext
) -> None:
    http_context.model, http_context.alias = "demo:x", SteeringRequest.model_validate(SPIDERS)
    assert steered(admission, SamplingParams()) == [fears.digests["spiders"]]
    with pytest.raises(VLLMValidationError, match="does not generate text; use the model itself"):
        taken_in(admission, PoolingParams(task="embed"))
    with pytest.raises(VLLMValidationError, match="is an alias that steers; remove 'steer'"):
        taken_in(admission, SamplingParams(extra_args={"steer": ["spiders"]}))


def test_what_goes_on_after_its_exchange_is_not_held_by_it(
    admission: Admission, fears: SteeringPack, http_context: HttpContext
) -> None:
    """Nobody would count it out again, and its pack could never be unloaded."""
    wanted = Wanted(SteeringRequest.model_validate(SPIDERS))
    plan = admitted(admission, wanted, 3, SamplingParams())
    digest = fears.digests["spiders"]
    assert http_context.receipts == [plan.receipt]
    assert admission.active[digest] == 1
    http_context.ended = True
    admitted(admission, wanted, 3, SamplingParams())
    assert http_context.receipts == [plan.receipt]
    assert admission.active[digest] == 1


@pytest.mark.parametrize(
    ("at", "answers", "prompts", "fits"),
    [
        ("all", 1, 1, True),
        ("all", 2, 1, False),
        ("all", 1, 2, False),
        ("generated", 9, 9, True),
        ([[-2, None]], 1, 1, True),
        ([[-2, None]], 1, 2, True),
    ],
)
def test_a_response_holds_no_more_scores_of_prompts_than_can_be_written_soon(
    at: Any,
    answers: int,
    prompts: int,
    fits: bool,
    fears: SteeringPack,
    http_context: HttpContext,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They cost a client nothing, as those of tokens that have to be generated do."""
    monkeypatch.setattr(request_plan, "MAX_PROMPT_SCORES", 64 * 5)
    admission = started(fears, reads=1)
    choices = [{"name": "spiders", "at": at}] * 64
    wanted = Wanted(SteeringRequest.model_validate({"read": choices}))
    params = SamplingParams(n=answers)
    for _ in range(prompts - 1):
        admitted(admission, wanted, 3, params)
    if fits:
        admitted(admission, wanted, 3, params)
    else:
        with pytest.raises(VLLMValidationError, match="would have more than 320 scores"):
            admitted(admission, wanted, 3, params)


def test_the_prompts_of_one_body_have_no_more_ranges_than_can_be_planned_at_once(
    admission: Admission, http_context: HttpContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(request_plan, "MAX_BODY_RANGES", 4)
    three = {"name": "spiders", "scale": 1.0, "positions": [[0, 1], [2, 3], [4, 5]]}
    one = {"name": "spiders", "scale": 1.0}
    wanted, plain = (
        Wanted(SteeringRequest.model_validate({"directions": [each]})) for each in (three, one)
    )
    for _ in range(2):
        admitted(admission, wanted, 6, SamplingParams())
    for _ in range(9):
        admitted(admission, plain, 6, SamplingParams())
    with pytest.raises(VLLMValidationError, match="may have 4 ranges of positions in total"):
        admitted(admission, wanted, 6, SamplingParams())


def test_a_further_turn_waits_for_the_rows_that_it_needs(admission: Admission) -> None:
    """The sums of a longer prompt may be others, where ranges meet that did not."""
    late = {"name": "New York", "scale": 1.0, "positions": [[-1, None]]}
    early = {"name": "spiders", "scale": 1.0, "positions": [[6, 8]]}
    wanted = Wanted(SteeringRequest.model_validate({"directions": [early, late]}))
    first = admission.admit(wanted, 4)
    params = SamplingParams(extra_args={PLAN_KEY: first})
    engine = SimpleNamespace(input_processor=SimpleNamespace(_vllm_steer_admission=admission))
    assert _plan(engine, {"prompt_token_ids": [1] * 4}, params) is first
    again = _plan(engine, {"prompt_token_ids": [1] * 9}, params)
    assert again is params.extra_args[PLAN_KEY]
    before, now = ({s.row_key for s in p.receipt.plan.segments} for p in (first, again))
    assert now - before
    assert again.receipt.plan == admission.admit(wanted, 9).receipt.plan


@pytest.mark.parametrize(("max_tokens", "fits"), [(1, False), (2, True), (None, True)])
def test_what_can_steer_no_token_is_refused(
    max_tokens: int | None, fits: bool, admission: Admission
) -> None:
    """The last token of an answer does not go through the model. A default is nobody's mistake."""
    params = SamplingParams(max_tokens=max_tokens, extra_args={"steering": LATE})
    if fits:
        assert steered(admission, params)
    else:
        with pytest.raises(
            VLLMValidationError, match="no token would be steered: the prompt has 3 tok"
        ):
            steered(admission, params)
    admission.policy = Policy(default=SteeringRequest.model_validate(LATE))
    assert steered(admission, SamplingParams(max_tokens=max_tokens))


@pytest.mark.parametrize("name", ["steer{}", "k{}", "s{}"])
def test_a_body_of_many_keys_is_looked_through_once(
    name: str, admission: Admission, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not once for each of them, which would stop the server for minutes."""
    monkeypatch.setattr(request_hooks, "current_admission", lambda: admission)
    unknown = {name.format(number): {"a": 1} for number in range(100_000)}
    asked = SimpleNamespace(model_extra=unknown, vllm_xargs=None)
    sampled = check_sampling(lambda self: SamplingParams())
    started = time.process_time()
    if name == "steer{}":
        with pytest.raises(VLLMValidationError, match="unknown steering argument 'steer0'"):
            sampled(asked)
    else:
        sampled(asked)
    assert time.process_time() - started < 10.0


def test_a_body_of_many_prompts_is_looked_through_once(
    admission: Admission, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[Any] = []

    def counted(keys: Any) -> list[str]:
        looked.append(keys)
        return steering_keys(keys)

    monkeypatch.setattr(request_hooks, "current_admission", lambda: admission)
    monkeypatch.setattr(request_hooks, "steering_keys", counted)
    one, other = (SimpleNamespace(model_extra={"steer": 1}, vllm_xargs=None) for _ in range(2))
    given = {"a": 1}
    sampled = check_sampling(lambda self, given=None: SamplingParams(extra_args=given))
    for request, arguments, times in (
        (one, None, 1),
        (one, None, 1),
        (one, given, 2),
        (other, given, 3),
    ):
        with pytest.raises(VLLMValidationError, match="steer must be a list"):
            sampled(request, arguments)
        assert len(looked) == times
