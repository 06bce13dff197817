"""The plan as it travels: read back as it was, and refused when it is something else."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from vllm import SamplingParams
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.output_processor import OutputProcessor

from vllm_steer.errors import RequestError
from vllm_steer.plan.message import VERSION, decode_plan, encode_plan, plan_of
from vllm_steer.plan.steering_plan import Form, Segment, SteeringPlan, Term
from vllm_steer.request.schedule import Schedule
from vllm_steer.request.schema import PLAN_KEY
from vllm_steer.request.stop_tokens import StopTokens
from vllm_steer.serving.engine_requests import note_arrival

FORM = Form("affine", "b" * 64, 0.5, "c" * 64, -1.0, True)
TERM = Term("a" * 64, 1 / 3, (0, 2), FORM, Schedule(7, 1.0, 0.0, 4, 1))
PLAN = SteeringPlan((Segment(0, 4, (TERM,), StopTokens(7, (1, 2))), Segment(4, None, (TERM,))))


def test_a_plan_is_read_back_bit_for_bit() -> None:
    message = encode_plan(PLAN)
    # A key that was asked for before is no part of what travels.
    assert PLAN.segments[0].key
    assert encode_plan(PLAN) == message
    found = decode_plan(message)
    assert found == PLAN
    assert [s.key for s in found.segments] == [s.key for s in PLAN.segments]
    # The scheduler asks for every block of a prompt.
    assert decode_plan(bytes(bytearray(message))) is found


@pytest.mark.parametrize(
    "change", [{"version": VERSION + 1}, {"more": 1}, {"segments": [{"start": 0}]}, {"segments": 3}]
)
def test_what_is_no_such_message_is_refused(change: dict[str, Any]) -> None:
    content = msgspec.msgpack.decode(encode_plan(PLAN)) | change
    with pytest.raises(RequestError, match="the steering plan"):
        decode_plan(msgspec.msgpack.encode(content))


@pytest.mark.parametrize("value", ["text", [[0, None]], {"segments": []}, 1])
def test_only_bytes_are_a_message(value: Any) -> None:
    with pytest.raises(RequestError, match="not bytes"):
        plan_of(SimpleNamespace(extra_args={PLAN_KEY: value}))


def test_requests_without_a_plan_have_none() -> None:
    assert plan_of(None) is None
    assert plan_of(SimpleNamespace(extra_args=None)) is None
    assert plan_of(SimpleNamespace(extra_args={"other": 1})) is None


@pytest.mark.parametrize("message", ["text", b"", b"\x90"])
def test_a_front_end_keeps_nothing_of_a_request_whose_plan_cannot_be_read(message: Any) -> None:
    params = SamplingParams(extra_args={PLAN_KEY: message}, detokenize=False)
    request = EngineCoreRequest("one", [1, 2], None, params, None, 0.0, None, None, None)
    request.external_req_id = "one"
    processor = OutputProcessor(None, log_stats=False)
    add_request = note_arrival(OutputProcessor.add_request)
    with pytest.raises(RequestError, match="the steering plan is malformed"):
        add_request(processor, request, None)
    assert not processor.request_states
    params.extra_args = {}
    add_request(processor, request, None)
    assert list(processor.request_states) == ["one"]
