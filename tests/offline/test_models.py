"""What a model runs in, and what an engine for offline work takes of the machine."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import offline.engine
from offline.engine import start_engine
from offline.models import chosen_dtype
from vllm_steer.errors import EvaluationError

CORES = "VLLM_CPU_NUM_OF_RESERVED_CPU"


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [({"amx_bf16": True}, "bfloat16"), ({"amx_bf16": False}, "float32"), ({}, "float32")],
)
def test_a_cpu_takes_bfloat16_where_it_is_made_for_it(
    monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, bool], expected: str
) -> None:
    """Others can do it too, but more slowly than float32."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert chosen_dtype("auto", "cpu") == expected
    assert chosen_dtype("float16", "cpu") == "float16"
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert chosen_dtype("auto", "cpu") == "float32"


@pytest.mark.parametrize("given", [None, "1"])
def test_an_offline_engine_takes_every_core_unless_told(
    monkeypatch: pytest.MonkeyPatch, given: str | None
) -> None:
    seen: list[str | None] = []

    def engine(**_: Any) -> SimpleNamespace:
        seen.append(os.environ.get(CORES))
        if len(seen) > 1:
            raise ValueError("no room")
        return SimpleNamespace()

    monkeypatch.setattr("vllm.LLM", engine)
    monkeypatch.setattr(offline.engine, "memory_settings", lambda *_: {})
    monkeypatch.delenv(CORES, raising=False)
    if given is not None:
        monkeypatch.setenv(CORES, given)
    start_engine("model", [], {})
    with pytest.raises(EvaluationError, match="no room"):
        start_engine("model", [], {})
    assert seen == [given or "0"] * 2
    assert os.environ.get(CORES) == given
