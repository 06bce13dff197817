"""Random malformed steering over HTTP; ``python -m benchmarks.fuzz_http`` is the long form."""

from __future__ import annotations

import asyncio
import random

import pytest

from benchmarks.fuzz_http import FAULTS, Outcome, attack
from offline.demo.server import Server

pytestmark = pytest.mark.server


def test_every_malformed_request_is_refused(server: Server) -> None:
    outcome = Outcome()
    asyncio.run(attack(server, 400, 7, outcome))
    assert not outcome.not_4xx, outcome.not_4xx[:3]
    assert outcome.requests == 400
    assert outcome.wrong == 0


def test_there_are_as_many_kinds_as_functions() -> None:
    rng = random.Random(0)
    assert len({fault(rng)[0] for fault in FAULTS}) == len(FAULTS)
