"""The process of one engine: starts vLLM and answers to :class:`benchmarks.engine.Engine`."""

from __future__ import annotations

import os
from typing import Any

from benchmarks.models import RANDOM_LOAD_FORMAT, register_random_weights
from vllm_steer.verify.engine_child import (
    COMMANDS,
    PACKAGES,
    describe,
    greedy,
    package_versions,
    serve,
)


def _prepare(arguments: dict[str, Any]) -> None:
    if os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1" and "TRITON_INTERPRET" in os.environ:
        from vllm_steer.testing.triton import pretend_triton_backend

        pretend_triton_backend()
    if arguments.get("load_format") == RANDOM_LOAD_FORMAT:
        register_random_weights()


def _profile(llm: Any, prompts: list[list[int]], extra: list[Any], steps: int) -> dict[str, Any]:
    from benchmarks.profile_step import WARM_UP_STEPS, profile_decode

    # One token comes of the prefill, and a step may be in flight when the profile ends.
    count = steps + WARM_UP_STEPS + 4
    return profile_decode(llm, prompts, [greedy(count, arguments) for arguments in extra], steps)


def _describe(llm: Any) -> dict[str, Any]:
    found = describe(llm)
    found["versions"] |= package_versions((*PACKAGES, "hotwire-vllm"))
    return found


if __name__ == "__main__":
    serve(COMMANDS | {"profile": _profile, "describe": _describe}, _prepare)
