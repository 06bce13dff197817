"""The cause of a failure in errors and logs as vLLM writes them."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import BaseModel, ValidationError

from vllm_steer.vllm_compat.memory import _left, available_bytes
from vllm_steer.vllm_compat.root_cause import MARK, cause_in_log, cause_of, elsewhere

START = "Engine core initialization failed. See root cause above. Failed core proc(s): {}"
WORKER = "Worker failed with error 'no room', please check the stack trace above for the root cause"


class Options(BaseModel):
    tokens: int


def test_the_cause_of_an_error() -> None:
    assert cause_of(ValueError("no\n  room")) == "ValueError: no room"
    assert cause_of(AssertionError()) == "AssertionError"
    assert cause_of(RuntimeError(WORKER)) == "no room"
    assert cause_of(RuntimeError(f"{START}. {MARK}ValueError: no room")) == "ValueError: no room"
    noted = RuntimeError("EngineCore encountered an issue.")
    noted.add_note(f"{MARK}VllmWorker-0 was ended by SIGKILL")
    assert cause_of(noted) == "VllmWorker-0 was ended by SIGKILL"
    with pytest.raises(ValidationError) as refused:
        Options.model_validate({"tokens": "many"})
    assert cause_of(refused.value).startswith(
        "ValidationError: tokens: Input should be a valid int"
    )
    assert len(cause_of(ValueError("a long text " * 1000))) < 2100


@pytest.mark.parametrize(
    ("log", "cause"),
    [
        (
            [
                "(EngineCore pid=7) ERROR 11-26 [core.py:1510] ValueError: no room",
                "(EngineCore pid=7) INFO 11-26 [x.py:1] all workers exited",
                f"RuntimeError: {START}",
                "x.py:254: UserWarning: resource_tracker: There appear to be 1 leaked objects",
            ],
            "ValueError: no room",
        ),
        (
            [
                "(Worker pid=8) ERROR 11-26 [x.py:953] ValueError: no weights",
                "(EngineCore pid=7) ERROR 11-26 [core.py:1] Exception: WorkerProc initialization failed due to",
                f"RuntimeError: {START}",
            ],
            "ValueError: no weights",
        ),
        ([f"(EngineCore pid=7) ERROR [core.py:1] RuntimeError: {WORKER}"], "no room"),
        (["KeyError: 'early'", f"RuntimeError: {START}. {MARK}no room"], "no room"),
        (
            ["ImportError: no Triton", "vllm serve: error: unrecognized arguments: --x"],
            "vllm serve: error: unrecognized arguments: --x",
        ),
        (
            ["pydantic.ValidationError: 1 validation error for ModelConfig", "  Invalid model"],
            "pydantic.ValidationError: 1 validation error for ModelConfig Invalid model",
        ),
        (["one", "two", ""], "two"),
        ([], "nothing"),
    ],
)
def test_the_cause_in_a_log(log: list[str], cause: str) -> None:
    assert cause_in_log("\n".join(log)) == cause


def test_errors_that_point_elsewhere() -> None:
    assert elsewhere(f"RuntimeError: {START}")
    assert not elsewhere("ValueError: no room")


@pytest.mark.parametrize(
    ("limit", "used", "cached"),
    [
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ],
)
def test_what_a_control_group_has_left(tmp_path: Path, limit: str, used: str, cached: str) -> None:
    for name, text in ((limit, "1000\n"), (used, "700\n"), ("memory.stat", f"{cached} 50\n")):
        (tmp_path / name).write_text(text)
    assert _left(tmp_path, limit, used) == 350
    (tmp_path / limit).write_text("max\n")
    assert _left(tmp_path, limit, used) is None
    assert _left(tmp_path / "nowhere", limit, used) is None


def test_the_memory_of_this_machine() -> None:
    kilobytes = int(Path("/proc/meminfo").read_text().split("MemTotal:")[1].split()[0])
    assert 0 < available_bytes() < kilobytes * 1024
