"""Random malformed steering over HTTP; ``python -m benchmarks.fuzz_http`` is the long form."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings

from benchmarks.fuzz_http import FAULTS, NAMES, Outcome, attack, send_value
from vllm_steer.offline.demo.server import Server
from vllm_steer.testing.fuzz_values import mutated

pytestmark = pytest.mark.server


def test_every_malformed_request_is_refused(server: Server) -> None:
    outcome = Outcome()
    asyncio.run(attack(server, 400, 7, outcome))
    assert not outcome.not_4xx, outcome.not_4xx[:3]
    assert outcome.requests == 400
    assert outcome.wrong == 0


def test_any_value_in_any_place_is_refused_or_answered(server: Server) -> None:
    outcome, rng = Outcome(), random.Random(0)
    with httpx.Client(base_url=server.url, timeout=60) as http:

        @settings(
            max_examples=250,
            deadline=None,
            database=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        )
        @given(mutated(NAMES))
        def send(value: Any) -> None:
            assert send_value(http, value, rng, outcome) is None

        send()
    # Neither all of them right nor all wrong.
    assert outcome.statuses[200] > 5
    assert outcome.statuses[400] > 100


def test_there_are_as_many_kinds_as_functions() -> None:
    rng = random.Random(0)
    assert len({fault(rng)[0] for fault in FAULTS}) == len(FAULTS)
