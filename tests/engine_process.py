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
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

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
    """

    tokens: list[int]
    logprobs: np.ndarray
    cached: int


class EngineProcess:
    """A vLLM engine in a child process.

    Args:
        arguments: Arguments of ``LLM``.
        env: Environment variables of the child.
        break_layer: Layer whose addition is removed before the engine starts.
        forked: Whether to fork from a process that has imported vLLM. Variables that are read on
            import then have no effect, and the engine runs in the one process.
    """

    def __init__(
        self,
        arguments: dict[str, Any],
        env: dict[str, str] | None = None,
        break_layer: int | None = None,
        forked: bool = False,
    ) -> None:
        context = multiprocessing.get_context("forkserver" if forked else "spawn")
        context.set_forkserver_preload(PRELOAD)
        self._connection, child = context.Pipe()
        self._process = context.Process(
            target=_run, args=(child, arguments, env or {}, break_layer, forked)
        )
        self._process.start()
        child.close()
        self._answer()

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        steerings: Sequence[dict[str, Any] | None],
        count: int,
    ) -> list[Output]:
        """Generates ``count`` tokens greedily for all prompts in one batch.

        Raises:
            RuntimeError: The engine refused; the message holds the type and text of its error.
        """
        self._connection.send(("generate", [list(p) for p in prompts], list(steerings), count))
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


def _run(
    connection: Connection,
    arguments: dict[str, Any],
    env: dict[str, str],
    break_layer: int | None,
    forked: bool,
) -> None:
    os.environ.update(env)
    if env.get("VLLM_USE_V2_MODEL_RUNNER") == "1":
        _pretend_triton_backend()
    from vllm import LLM, SamplingParams

    if break_layer is not None:
        _break(break_layer)
    if forked:
        _prepare_forked(arguments)
    try:
        llm = LLM(**arguments)
    except Exception as error:
        connection.send(("error", f"{type(error).__name__}: {error}"))
        return
    connection.send(("ready", None))
    while True:
        try:
            command, *rest = connection.recv()
        except EOFError:
            command = "stop"
        if command == "stop":
            llm.llm_engine.engine_core.shutdown()
            # Without this, threads that vLLM left behind would keep the process for a minute.
            os._exit(0)
        if command == "config_hash":
            connection.send(("value", llm.llm_engine.vllm_config.compute_hash()))
            continue
        prompts, steerings, count = rest
        params = [
            SamplingParams(
                max_tokens=count,
                temperature=0.0,
                ignore_eos=True,
                logprobs=-1,
                detokenize=False,
                extra_args={"steering": steering} if steering is not None else None,
            )
            for steering in steerings
        ]
        try:
            outputs = llm.generate(
                [{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False
            )
        except Exception as error:
            connection.send(("error", f"{type(error).__name__}: {error}"))
            continue
        connection.send(("value", [_output(output) for output in outputs]))


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


def _output(output: Any) -> Output:
    completion = output.outputs[0]
    rows = [
        [position[token].logprob for token in range(len(position))]
        for position in completion.logprobs
    ]
    return Output(list(completion.token_ids), np.array(rows), output.num_cached_tokens)


def _break(layer: int) -> None:
    """Leaves the addition of one layer without effect, as a dead site would."""
    from vllm_steer.engine import blocks

    hook_blocks = blocks.hook_blocks

    def without(pairs: Any, bank: Any) -> None:
        hook_blocks([pair for pair in pairs if pair[0] != layer], bank)

    import vllm_steer.engine.worker as worker

    worker.hook_blocks = without


def _pretend_triton_backend() -> None:
    """Lets Model Runner V2 run on CPU: Triton's interpreter needs no backend, vLLM asks for one."""
    from triton.backends import backends

    driver = type("Driver", (), {"is_active": staticmethod(lambda: True)})
    backends["cpu"] = types.SimpleNamespace(driver=driver, compiler=None)
    import vllm.triton_utils  # noqa: F401

    del backends["cpu"]
