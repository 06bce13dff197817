"""Real vLLM engines for tests, each in a process of its own.

An engine patches, binds threads and holds memory for its whole process, so tests that compare
engines keep them apart.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from vllm_steer.plan.scores import SCORES_ATTRIBUTE
from vllm_steer.testing.forked import forked, stay_in_one_process
from vllm_steer.testing.triton import prepare_model_runner
from vllm_steer.verify.process import EngineProcess, ProcessOptions, fresh

if TYPE_CHECKING:
    from vllm import LLM

START_TIMEOUT = 600


@dataclass(frozen=True)
class Output:
    """What an engine answered to one request.

    Attributes:
        tokens: Generated token ids.
        logprobs: ``[tokens, vocabulary]``, float64.
        cached: Prompt tokens found in the prefix cache.
        prompt_logprobs: ``[prompt tokens - 1, vocabulary]``, float64, when they were asked for.
        text: The generated text, where a regex was asked for.
        scores: ``[reads, prompt and answer]``, float32, where a request read something.
        reasons: Why the answer ended: ``finish_reason`` and ``stop_reason``.
    """

    tokens: list[int]
    logprobs: NDArray[np.float64]
    cached: int
    prompt_logprobs: NDArray[np.float64] | None
    text: str
    scores: NDArray[np.float32] | None
    reasons: tuple[Any, Any]


class Engine(EngineProcess):
    """An engine process that is asked for all that tests compare.

    Args:
        arguments: Arguments of ``LLM``.
        environment: Environment variables that differ from this process's.
        prepare: Functions that the process calls before it imports vLLM's engine.
        fork: Whether to fork from a process that has imported vLLM. Variables that are read on
            import then have no effect, and the engine runs in the one process.

    Raises:
        EngineError: The engine does not start.
    """

    def __init__(
        self,
        arguments: dict[str, Any],
        environment: dict[str, str] | None = None,
        prepare: Sequence[Callable[[], None]] = (),
        fork: bool = False,
    ) -> None:
        options = ProcessOptions(
            # Where functions of tests are found.
            path=[Path(folder) for folder in sys.path if folder],
            timeout=START_TIMEOUT,
            prepare=partial(_prepare, tuple(prepare), fork),
            launch=forked if fork else fresh,
        )
        super().__init__("the engine", arguments, environment or {}, options)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        steerings: Sequence[dict[str, Any] | None],
        count: int,
        adapters: Sequence[str | None] = (),
        **sampling: Any,
    ) -> list[Output]:
        """Generates ``count`` tokens for all prompts in one batch, greedily unless told otherwise.

        Args:
            prompts: Token ids of each prompt.
            steerings: The steering of each.
            count: Tokens to generate.
            adapters: Directory of each request's LoRA adapter; empty for none.
            sampling: More fields of ``SamplingParams``; ``regex`` constrains the text.

        Returns:
            The outputs in the order of the prompts, those of one prompt together.

        Raises:
            EngineError: The engine refused; the message holds the type and text of its error.
        """
        given = ([list(prompt) for prompt in prompts], list(steerings), count, list(adapters))
        return self.call(_generate, *given, sampling)

    def metrics(self) -> dict[str, float]:
        """Counters and gauges of the engine by name."""
        return self.call(_metrics)

    def send_raw_plan(self, prompt: Sequence[int], extra_args: dict[str, Any]) -> None:
        """Sends a request past admission and the front end's other checks, as a faulty front end would.

        Raises:
            EngineError: The engine failed the request.
        """
        self.call(_raw, list(prompt), extra_args)

    def ask(self, prompts: Sequence[Any], params: Sequence[Any]) -> Any:
        """What ``LLM.generate`` returns or raises."""
        answer = self.call(_ask, prompts, params)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def facts(self) -> tuple[Any, int]:
        """Dtype of the model, and most tokens of a request."""
        return self.call(_facts)

    def is_asynchronous(self) -> bool:
        """Whether a step is scheduled before the tokens of the last one are known."""
        return self.call(_is_asynchronous)

    def config_hash(self) -> str:
        """Key of the engine's configuration in vLLM's compile cache."""
        return self.call(_config_hash)


class ForkedLLM:
    """Stands in for ``vllm.LLM`` where an engine that starts in processes of its own is no part of the test."""

    def __init__(self, **arguments: Any) -> None:
        engine = Engine(arguments, fork=True)
        dtype, longest = engine.facts()
        self.generate = lambda prompts, params, use_tqdm: engine.ask(prompts, params)
        self.llm_engine = types.SimpleNamespace(
            model_config=types.SimpleNamespace(dtype=dtype, max_model_len=longest),
            engine_core=types.SimpleNamespace(shutdown=engine.close),
        )


def _prepare(
    functions: Sequence[Callable[[], None]], fork: bool, arguments: dict[str, Any]
) -> None:
    prepare_model_runner()
    for function in functions:
        function()
    if fork:
        stay_in_one_process(arguments)


def _generate(
    llm: Any,
    prompts: list[list[int]],
    steerings: list[dict[str, Any] | None],
    count: int,
    adapters: list[str | None],
    sampling: dict[str, Any],
) -> list[Output]:
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest
    from vllm.sampling_params import StructuredOutputsParams

    regex = sampling.pop("regex", None)
    structured = {"structured_outputs": StructuredOutputsParams(regex=regex)} if regex else {}
    defaults = {"temperature": 0.0, "ignore_eos": True, "logprobs": -1, "detokenize": bool(regex)}
    fields = defaults | sampling | structured
    params = [
        SamplingParams(
            max_tokens=count,
            extra_args={"steering": steering} if steering is not None else None,
            **fields,
        )
        for steering in steerings
    ]
    loras = [path and LoRARequest(path, 1 + adapters.index(path), path) for path in adapters]
    outputs = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts],
        params,
        use_tqdm=False,
        lora_request=loras or None,
    )
    return [_output(output, sample) for output in outputs for sample in output.outputs]


def _ask(llm: LLM, prompts: Sequence[Any], params: Sequence[Any]) -> Any:
    try:
        return llm.generate(prompts, params, use_tqdm=False)
    except Exception as error:
        return error


def _facts(llm: LLM) -> tuple[Any, int]:
    config = llm.llm_engine.model_config
    return config.dtype, config.max_model_len


def _is_asynchronous(llm: LLM) -> bool:
    return bool(llm.llm_engine.vllm_config.scheduler_config.async_scheduling)


def _config_hash(llm: LLM) -> str:
    return llm.llm_engine.vllm_config.compute_hash()


def _metrics(llm: LLM) -> dict[str, float]:
    return {one.name: one.value for one in llm.get_metrics() if hasattr(one, "value")}


def _raw(llm: Any, prompt: list[int], extra_args: dict[str, Any]) -> None:
    """Hands the engine core a request whose extra arguments admission never saw."""
    from vllm import SamplingParams

    engine, params = llm.llm_engine, SamplingParams(max_tokens=4, ignore_eos=True)
    request = engine.input_processor.process_inputs(
        "raw", {"type": "token", "prompt_token_ids": prompt}, params, ("generate",)
    )
    engine.input_processor.assign_request_id(request)
    engine.output_processor.add_request(request, None)
    request.sampling_params.extra_args = extra_args
    engine.engine_core.add_request(request)
    while engine.has_unfinished_requests():
        for output in engine.step():
            reason = output.outputs[0].finish_reason
            if output.finished and reason != "length":
                raise RuntimeError(f"the request finished with {reason!r}")


def _output(output: Any, sample: Any) -> Output:
    def rows(positions: Any) -> NDArray[np.float64]:
        return np.array([[row[token].logprob for token in range(len(row))] for row in positions])

    prompt = output.prompt_logprobs
    scores = getattr(sample, SCORES_ATTRIBUTE, None)
    length = len(output.prompt_token_ids) + len(sample.token_ids)
    return Output(
        list(sample.token_ids),
        rows(sample.logprobs),
        output.num_cached_tokens,
        None if prompt is None else rows(prompt[1:]),
        sample.text,
        None if scores is None else scores.to_numpy(length),
        (sample.finish_reason, sample.stop_reason),
    )
