"""What counts as a difference, what a page says, and how the death of an engine is told."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from vllm_steer.errors import EngineError
from vllm_steer.testing.forked import forked
from vllm_steer.verify.compare import Tolerance, between, to_reference, tolerance
from vllm_steer.verify.engine_calls import Answer
from vllm_steer.verify.process import EngineProcess, ProcessOptions, fresh
from vllm_steer.verify.report import Check, Report, judged, not_checked

ALLOWED = Tolerance(largest=0.1, mean=0.05)
LIKELY, OTHER, RARE = math.log(0.6), math.log(0.3), math.log(0.1)


def answer(tokens: list[int], *rows: dict[int, float]) -> Answer:
    return Answer(tokens, list(rows), 0)


def test_another_token_is_a_fault_unless_the_two_tie() -> None:
    one = answer([0], {0: LIKELY, 1: OTHER})
    assert "another token" in str(
        between(one, answer([1], {0: LIKELY, 1: OTHER})).fault(Tolerance(0.5, 0.5))
    )
    tied = answer([1], {0: -0.70, 1: -0.69})
    assert between(answer([0], {0: -0.69, 1: -0.70}), tied).fault(ALLOWED) is None
    # A token that is not among the best of the other answer.
    assert between(one, answer([2], {2: LIKELY, 1: OTHER})).fault(ALLOWED) is not None


def test_nothing_is_compared_behind_the_token_where_answers_part() -> None:
    one = answer([0, 5], {0: -0.69, 1: -0.70}, {5: -0.1})
    other = answer([1, 5], {0: -0.70, 1: -0.69}, {5: -9.0})
    difference = between(one, other)
    assert (difference.tokens, len(difference.gaps)) == (1, 1)
    assert difference.fault(ALLOWED) is None


def test_against_the_reference_every_token_counts() -> None:
    expected = np.array([[LIKELY, OTHER, RARE]] * 2, dtype=np.float32)
    rows = {0: LIKELY, 1: OTHER}
    assert to_reference(answer([0, 0], rows, rows), expected).fault(ALLOWED) is None
    far = to_reference(answer([0, 0], rows, {0: LIKELY - 0.2, 1: OTHER}), expected)
    assert far.fault(ALLOWED) == "a log-probability differs by 0.2"
    assert "on average" in str(
        to_reference(answer([0], {0: LIKELY - 0.09}), expected[:1]).fault(ALLOWED)
    )
    wrong = to_reference(answer([1, 0], rows, rows), expected)
    assert "another token" in str(wrong.fault(ALLOWED))
    unknown = to_reference(answer([0], {0: math.nan}), expected[:1])
    assert unknown.fault(ALLOWED) is not None


def test_half_precision_and_tf32_are_allowed_more() -> None:
    exact = tolerance("float32", "cpu")
    assert (
        exact.largest < tolerance("float16", "cpu").largest < tolerance("bfloat16", "cpu").largest
    )
    assert tolerance("float32", "NVIDIA H100") == tolerance("float16", "cpu")


def test_what_was_left_out_stands_on_the_first_line() -> None:
    passed = Check("start", "passed", "fine", {})
    report = Report({"model": "m"}, [passed, not_checked("parity", "left out")])
    assert report.exit_status == 0
    assert report.page().splitlines()[0] == "vllm-steer verify: passed; not checked: parity"
    failed = judged("parity", ["it differs"], "so much", {})
    assert Report({}, [passed, failed]).exit_status == 1
    assert Report({}, [], "no vLLM").exit_status == 2


def without_vllm(arguments: dict[str, Any]) -> None:
    """What is tested is the process, whatever its engine."""
    sys.modules["vllm"] = types.SimpleNamespace(LLM=lambda: None)  # type: ignore[assignment]


def die(llm: Any) -> None:
    sys.stderr.write("ERROR somewhere: MemoryError: no room\n")
    sys.stderr.flush()
    os.kill(os.getpid(), signal.SIGKILL)


def refuse(llm: Any, word: str) -> None:
    raise ValueError(word)


def start_another(llm: Any) -> int:
    return subprocess.Popen(["sleep", "600"]).pid


@pytest.mark.parametrize("launch", [fresh, pytest.param(forked, marks=pytest.mark.engine)])
def test_an_engine_tells_of_errors_and_death_and_ends_with_what_it_started(launch: Any) -> None:
    options = ProcessOptions([Path(__file__).parents[2]], prepare=without_vllm, launch=launch)
    engine = EngineProcess("the engine", {}, {}, options)
    try:
        other = psutil.Process(engine.call(start_another))
        with pytest.raises(EngineError, match=r"^the engine: ValueError: no$"):
            engine.call(refuse, "no")
        with pytest.raises(EngineError, match=r"ended by SIGKILL.*MemoryError: no room$"):
            engine.call(die)
        with pytest.raises(EngineError, match="the engine died"):
            engine.call(refuse, "no")
    finally:
        engine.close()
    deadline = time.monotonic() + 10
    while psutil.pid_exists(other.pid) and other.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "what the engine started outlives it"
        time.sleep(0.05)
