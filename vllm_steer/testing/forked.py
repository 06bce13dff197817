"""Engines in processes that are forked from one that has imported vLLM, which takes ten seconds and more."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
from collections.abc import Mapping
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from vllm_steer.verify.engine_child import serve
from vllm_steer.verify.process import Process

# What an engine imports in its process.
PRELOAD = [
    "vllm.v1.engine.core",
    "vllm.v1.engine.llm_engine",
    "vllm.v1.worker.cpu_worker",
    "vllm.v1.worker.cpu_model_runner",
    "vllm.entrypoints.llm",
]


class _Forked:
    """A process of the fork server, as ``subprocess.Popen`` has it."""

    def __init__(self, process: ForkServerProcess) -> None:
        self._process = process
        process.start()

    @property
    def pid(self) -> int:
        pid = self._process.pid
        assert pid is not None
        return pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired("the engine", timeout or 0.0)
        return self.returncode

    def send_signal(self, sig: int) -> None:
        if self.returncode is None:
            os.kill(self.pid, sig)


def forked(end: Connection[Any, Any], log: Path, environment: Mapping[str, str]) -> Process:
    """Forks a process that serves an engine, as :func:`vllm_steer.verify.process.fresh` starts a new Python.

    Variables that are read on import have no effect.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    return _Forked(context.Process(target=_run, args=(end, log, dict(environment))))


def _run(end: Connection[Any, Any], log: Path, environment: dict[str, str]) -> None:
    # A group of its own, so that the processes that vLLM starts end with it.
    os.setsid()
    with log.open("a") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    os.environ.update(environment)
    serve(end)


def stay_in_one_process(arguments: dict[str, Any]) -> None:
    """Spares an engine what would start other processes, or would compile.

    Args:
        arguments: Arguments of ``LLM``.
    """
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
