"""Attaches steering to a worker if its engine was started with it."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from vllm.config import set_current_vllm_config

from vllm_steer import log
from vllm_steer.config import ResolvedConfig, resolved_config
from vllm_steer.engine import runner_v1, runner_v2
from vllm_steer.engine.residual_selftest import check_residuals
from vllm_steer.engine.selftest import run_self_test
from vllm_steer.engine.worker import RunnerFacts, WorkerSteering
from vllm_steer.vllm_compat import patched_symbols as symbols
from vllm_steer.vllm_compat import patches
from vllm_steer.vllm_compat.model_shape import model_shape, resolved_dtype
from vllm_steer.vllm_compat.patches import override
from vllm_steer.vllm_compat.rpc import FACTS, TIMES, WorkerFacts

if TYPE_CHECKING:
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner as V2Runner
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner as V1Runner
    from vllm.v1.worker.gpu_worker import Worker


def attach_to_worker(worker: Worker) -> None:
    """Wraps the loading and warm-up of one worker; changes nothing if steering is off.

    Args:
        worker: A vLLM worker whose device is initialised and whose model is not yet loaded.
    """
    config = resolved_config(worker.vllm_config.additional_config)
    if config is None:
        return
    runner = worker.model_runner
    adapter = runner_v2 if worker.use_v2_model_runner else runner_v1
    patches.check_methods(runner, symbols.V2_RUNNER if adapter is runner_v2 else symbols.V1_RUNNER)
    patches.check_methods(worker, symbols.WORKER)
    load_model, warm_up = runner.load_model, worker.compile_or_warm_up_model
    steering: WorkerSteering | None = None
    self_tested = False

    def _load_model(*args: Any, **kwargs: Any) -> None:
        nonlocal steering
        load_model(*args, **kwargs)
        steering = _steer(runner, worker, config)
        adapter.attach(runner, steering)

    def _compile_or_warm_up_model(*args: Any, **kwargs: Any) -> object:
        nonlocal self_tested
        if steering is None:
            raise RuntimeError("the model was warmed up before it was loaded")

        def forward(num_tokens: int, graphs: bool = True) -> torch.Tensor:
            hidden: torch.Tensor = adapter.dummy_hidden_states(runner, num_tokens, graphs=graphs)
            return hidden

        if steering.bank.rank or steering.reading is not None:
            # Before graph capture, since captured graphs would be replayed instead of the Python code.
            with set_current_vllm_config(worker.vllm_config):
                check_residuals(steering, runner.get_model(), partial(forward, graphs=False))
        result = warm_up(*args, **kwargs)
        with set_current_vllm_config(worker.vllm_config):
            run_self_test(steering, forward)
        self_tested = True
        log.SELF_TEST_PASSED.write(layers=list(steering.layers))
        return result

    def _times() -> tuple[int, float, int]:
        return steering.take_times() if steering is not None else (0, 0.0, 0)

    def _facts() -> WorkerFacts:
        layers = list(steering.layers) if steering is not None else []
        return {"layers": layers, "self_tested": self_tested}

    override(runner, load_model=_load_model)
    override(worker, compile_or_warm_up_model=_compile_or_warm_up_model)
    override(worker, **{TIMES: _times, FACTS: _facts})


def _steer(runner: V1Runner | V2Runner, worker: Worker, config: ResolvedConfig) -> WorkerSteering:
    if worker.device is None:
        raise RuntimeError("the model was loaded before its device was initialised")
    shape = model_shape(runner.model_config)
    facts = RunnerFacts(
        num_layers=shape["num_layers"],
        hidden_size=shape["hidden_size"],
        max_num_tokens=runner.max_num_tokens,
        dtype=resolved_dtype(runner.model_config),
        device=worker.device,
        speculative=worker.vllm_config.speculative_config is not None,
    )
    return WorkerSteering(config, runner.get_model(), facts)
