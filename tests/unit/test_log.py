"""What stands in the log: one line for each event, typed fields, nothing private, no flood."""

from __future__ import annotations

import asyncio
import json
import logging
import time

import pytest
from pythonjsonlogger.json import JsonFormatter

from vllm_steer import log
from vllm_steer.errors import RequestError, UnknownDirectionError
from vllm_steer.request.schema import parse
from vllm_steer.serving import refusals
from vllm_steer.serving.asgi import key_digest
from vllm_steer.serving.refusals import RefusalLog, count_refusal

PRIVATE = "the-secret\nERROR forged"


def events(logged: list[logging.LogRecord]) -> list[dict]:
    return [record.steering for record in logged]


def test_a_line_has_its_fields_twice_and_is_one_line(logged: list[logging.LogRecord]) -> None:
    log.PACK_LOADED.write(name="late\nERROR", sha256="ab", directions=2, replaced=None, key=None)
    (record,) = logged
    before, _, fields = record.getMessage().partition(": ")
    assert before == "Steering pack loaded"
    assert "\n" not in fields
    assert {"event": "pack_loaded", **json.loads(fields)} == record.steering
    shown = json.loads(JsonFormatter("%(levelname)s %(message)s").format(record))
    assert shown["steering"]["directions"] == 2
    assert shown["steering"]["replaced"] is None
    assert record.funcName == "test_a_line_has_its_fields_twice_and_is_one_line"


@pytest.mark.parametrize(
    ("extra_args", "field"),
    [
        ({"steering": {"directions": [{"name": "a", "scale": PRIVATE}]}}, "steering.directions.0.scale"),
        ({"steering": {"directions": [{"name": "a", PRIVATE: 1}]}}, "steering.directions.0"),
        ({"steering": PRIVATE}, "steering"),
        ({"steer": [f"{PRIVATE}:{PRIVATE}"]}, "steer"),
        ({"steer": ["a"], "steer_positions": [PRIVATE]}, "steer_positions"),
        ({"steer": ["a"], f"steer{PRIVATE}": 1}, "steering"),
    ],
)  # fmt: skip
def test_refusals_name_the_field_and_nothing_that_the_client_wrote(
    extra_args: dict,
    field: str,
    logged: list[logging.LogRecord],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(refusals, "_log", RefusalLog())
    digest = key_digest({"headers": [(b"authorization", b"Bearer " + PRIVATE.encode())]})

    async def refuse() -> None:
        try:
            parse(extra_args)
        except RequestError as error:
            count_refusal(error, "/v1/completions", digest)

    asyncio.run(refuse())
    (record,) = logged
    assert record.levelno == logging.WARNING
    key = record.steering["key"]
    assert record.steering == {
        "event": "refused",
        "reason": "malformed",
        "field": field,
        "route": "/v1/completions",
        "key": key,
    }
    assert digest is not None
    assert digest.startswith(key)
    assert len(key) < len(digest)
    assert "secret" not in record.getMessage()


def test_repeated_refusals_become_one_line(logged: list[logging.LogRecord]) -> None:
    async def refuse() -> None:
        refusals = RefusalLog(lines=3, seconds=0.05)
        for _ in range(100):
            refusals.write("dose", "steering", None, None)
        refusals.write("conflict", "packs", None, None)
        await asyncio.sleep(0.2)
        refusals.write("dose", "steering", None, None)

    asyncio.run(refuse())
    shown = [(e["event"], e["reason"], e.get("count")) for e in events(logged)]
    single = ("refused", "dose", None)
    more = ("refused_more", "dose", 97)
    assert shown == [single, single, single, ("refused", "conflict", None), more, single]


def test_a_loop_that_was_closed_leaves_no_count_behind(logged: list[logging.LogRecord]) -> None:
    refusals_of_all = RefusalLog(lines=1, seconds=0.05)

    async def refuse() -> None:
        refusals_of_all.write("dose", "steering", None, None)
        refusals_of_all.write("dose", "steering", None, None)

    asyncio.run(refuse())
    time.sleep(0.1)
    asyncio.run(refuse())
    assert [e["event"] for e in events(logged)] == ["refused", "refused_more", "refused"]


def test_outside_a_server_the_caller_alone_is_told(logged: list[logging.LogRecord]) -> None:
    count_refusal(UnknownDirectionError("steering.directions.0.name: no such"), None, None)
    assert not logged


def test_a_client_is_not_told_all_that_it_sent() -> None:
    """Its body may have megabytes, and each message would be as long."""
    name = "steer" + "x" * 10**6
    with pytest.raises(RequestError) as refused:
        parse({name: 1})
    found = str(refusals.refusal(refused.value))
    assert len(found) < 3000
    assert found.startswith("unknown steering argument 'steerxxx")
    assert "did you mean" not in found
    assert "available: 'steer'" in found
