"""Real vLLM engines for the tests, each in a process of its own.

An engine patches, binds threads and holds memory for its whole process, so tests that compare
engines keep them apart. Processes with the environment of the tests may be forked from one that has
imported vLLM, which takes ten seconds and more.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from vllm_steer.plan.scores import SCORES_ATTRIBUTE
from vllm_steer.testing.triton import pretend_triton_backend
from vllm_steer.verify.engine_loop import answer_commands

START_TIMEOUT = 600
# What an engine imports in its process.
PRELOAD = [
    "vllm.v1.engine.core",
    "vllm.v1.engine.llm_engine",
    "vllm.v1.worker.cpu_worker",
    "vllm.v1.worker.cpu_model_runner",
    "vllm.entrypoints.llm",
]


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
    logprobs: np.ndarray
    cached: int
    prompt_logprobs: np.ndarray | None
    text: str
    scores: np.ndarray | None
    reasons: tuple[Any, Any]


class EngineProcess:
    """A vLLM engine in a child process.

    Args:
        arguments: Arguments of ``LLM``.
        env: Environment variables of the child.
        prepare: Functions that the child calls before it imports vLLM's engine.
        forked: Whether to fork from a process that has imported vLLM. Variables that are read on
            import then have no effect, and the engine runs in the one process.
    """

    def __init__(
        self,
        arguments: dict[str, Any],
        env: dict[str, str] | None = None,
        prepare: Sequence[Callable[[], None]] = (),
        forked: bool = False,
    ) -> None:
        context = multiprocessing.get_context("forkserver" if forked else "spawn")
        context.set_forkserver_preload(PRELOAD)
        self._connection, child = context.Pipe()
        self._process = context.Process(
            target=_run, args=(child, arguments, env or {}, prepare, forked)
        )
        self._process.start()
        child.close()
        self._answer()

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
            RuntimeError: The engine refused; the message holds the type and text of its error.
        """
        given = ([list(prompt) for prompt in prompts], list(steerings), count)
        self._connection.send(("generate", *given, list(adapters), sampling))
        return self._answer()

    def metrics(self) -> dict[str, float]:
        """Counters and gauges of the engine by name."""
        self._connection.send(("metrics",))
        return self._answer()

    def send_raw_plan(self, prompt: Sequence[int], extra_args: dict[str, Any]) -> None:
        """Sends a request past admission, as a faulty front end would.

        Raises:
            RuntimeError: The engine failed the request.
        """
        self._connection.send(("raw", list(prompt), extra_args))
        self._answer()

    def ask(self, prompts: Sequence[Any], params: Sequence[Any]) -> Any:
        """What ``LLM.generate`` returns or raises."""
        self._connection.send(("ask", prompts, params))
        answer = self._answer()
        if isinstance(answer, Exception):
            raise answer
        return answer

    def facts(self) -> tuple[Any, int]:
        """Dtype of the model, and most tokens of a request."""
        self._connection.send(("facts",))
        return self._answer()

    def config_hash(self) -> str:
        """Key of the engine's configuration in vLLM's compile cache."""
        self._connection.send(("config_hash",))
        return self._answer()

    def close(self) -> None:
        """Ends the process and those that it started."""
        self._connection.send(("stop",))
        self._process.join(60)
        if self._process.is_alive():
            self._process.kill()

    def _answer(self) -> Any:
        if not self._connection.poll(START_TIMEOUT):
            raise RuntimeError(f"the engine did not answer in {START_TIMEOUT} s")
        try:
            kind, value = self._connection.recv()
        except EOFError:
            raise RuntimeError("the engine process died") from None
        if kind == "error":
            raise RuntimeError(value)
        return value


class ForkedLLM:
    """Stands in for ``vllm.LLM`` where an engine that starts in processes of its own is no part of the test."""

    def __init__(self, **arguments: Any) -> None:
        process = EngineProcess(arguments, forked=True)
        dtype, longest = process.facts()
        self.generate = lambda prompts, params, use_tqdm: process.ask(prompts, params)
        self.llm_engine = types.SimpleNamespace(
            model_config=types.SimpleNamespace(dtype=dtype, max_model_len=longest),
            engine_core=types.SimpleNamespace(shutdown=process.close),
        )


def _run(
    connection: Connection,
    arguments: dict[str, Any],
    env: dict[str, str],
    prepare: Sequence[Callable[[], None]],
    forked: bool,
) -> None:
    os.environ.update(env)
    if env.get("VLLM_USE_V2_MODEL_RUNNER") == "1":
        pretend_triton_backend()
    for function in prepare:
        function()
    from vllm import LLM

    if forked:
        _prepare_forked(arguments)
    commands: dict[str, Callable[..., Any]] = {
        "generate": _generate,
        "raw": _raw,
        "ask": _ask,
        "facts": lambda llm: (
            llm.llm_engine.model_config.dtype,
            llm.llm_engine.model_config.max_model_len,
        ),
        "config_hash": lambda llm: llm.llm_engine.vllm_config.compute_hash(),
        "metrics": lambda llm: {m.name: getattr(m, "value", None) for m in llm.get_metrics()},
    }
    answer_commands(connection, lambda: LLM(**arguments), commands)


def _prepare_forked(arguments: dict[str, Any]) -> None:
    """Spares an engine of the one process what would start others, or would compile."""
    import torch
    from vllm import ModelRegistry

    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    if arguments["enforce_eager"]:
        # vLLM compiles the ranking of log-probabilities even where it runs the model eagerly.
        torch.compiler.set_stance("force_eager")
    # vLLM asks a class what it can do in a process of its own, once per machine and class.
    config = json.loads((Path(arguments["model"]) / "config.json").read_text())
    for architecture in config["architectures"]:
        model = ModelRegistry.models.get(architecture)
        if model is not None:
            ModelRegistry.register_model(architecture, model.load_model_cls())


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


def _ask(llm: Any, prompts: Sequence[Any], params: Sequence[Any]) -> Any:
    try:
        return llm.generate(prompts, params, use_tqdm=False)
    except Exception as error:
        return error


def _raw(llm: Any, prompt: list[int], extra_args: dict[str, Any]) -> None:
    """Hands the engine core a request whose extra arguments admission never saw."""
    from vllm import SamplingParams

    engine, params = llm.llm_engine, SamplingParams(max_tokens=4, ignore_eos=True)
    request = engine.input_processor.process_inputs(
        "raw", {"type": "token", "prompt_token_ids": prompt}, params, ("generate",)
    )
    request.sampling_params.extra_args = extra_args
    engine.add_request("raw", request, params)
    while engine.has_unfinished_requests():
        for output in engine.step():
            reason = output.outputs[0].finish_reason
            if output.finished and reason != "length":
                raise RuntimeError(f"the request finished with {reason!r}")


def _output(output: Any, sample: Any) -> Output:
    def rows(positions: Any) -> np.ndarray:
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
