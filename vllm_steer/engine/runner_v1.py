"""Adapter for vLLM's V1 model runners (``GPUModelRunner`` and its CPU subclass).

The methods are wrapped on the runner instance, so an engine without steering in the same process runs
unmodified vLLM code.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from vllm.config import CUDAGraphMode

from vllm_steer.engine.reading import carry_scores
from vllm_steer.engine.stage_scores import hand_on_stage_scores
from vllm_steer.engine.worker import WorkerSteering
from vllm_steer.vllm_compat.patches import override

if TYPE_CHECKING:
    import numpy as np
    from vllm.sequence import IntermediateTensors
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner


def attach(runner: GPUModelRunner, steering: WorkerSteering) -> None:
    """Connects a V1 runner to the steering.

    Args:
        runner: The runner, with its model loaded.
        steering: The worker's steering.
    """
    update_states, prepare_inputs, dummy_run = (
        runner._update_states,
        runner._prepare_inputs,
        runner._dummy_run,
    )

    def _update_states(scheduler_output: SchedulerOutput) -> Callable[..., object] | None:
        result = update_states(scheduler_output)
        for request_id in scheduler_output.finished_req_ids:
            steering.remove_request(request_id)
        # A preempted request keeps its entry: V1 resumes it without sending its parameters again.
        for request in scheduler_output.scheduled_new_reqs:
            tokens = request.prompt_token_ids or ()
            steering.add_request(request.req_id, request.sampling_params, tokens)
        return result

    def _prepare_inputs(
        scheduler_output: SchedulerOutput, num_scheduled_tokens: np.ndarray
    ) -> tuple[object, ...]:
        result = prepare_inputs(scheduler_output, num_scheduled_tokens)
        # Read here, after _update_states, which reorders and condenses the batch.
        batch = runner.input_batch
        steering.prepare_step(
            batch.req_ids,
            batch.num_computed_tokens_cpu,
            num_scheduled_tokens,
            runner.positions,
            runner.input_ids.gpu,
        )
        return result

    def _dummy_run(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        steering.prepare_dummy_step()
        return dummy_run(*args, **kwargs)

    override(
        runner,
        _update_states=_update_states,
        _prepare_inputs=_prepare_inputs,
        _dummy_run=_dummy_run,
    )
    if steering.reading is not None:
        carry_scores(runner, steering.reading)
        hand_on_stage_scores(runner, steering.reading)


def dummy_hidden_states(
    runner: GPUModelRunner, num_tokens: int, *, graphs: bool = True
) -> torch.Tensor:
    """Final hidden states ``[num_tokens, hidden_size]`` of a dummy run, for the self-tests.

    Args:
        runner: The runner.
        num_tokens: Tokens of the run.
        graphs: Whether CUDA graphs may be replayed; none may before they are captured.
    """
    mode = None if graphs else CUDAGraphMode.NONE
    # With attention: without its metadata a backend may leave the output uninitialised.
    hidden = runner._dummy_run(num_tokens, cudagraph_runtime_mode=mode, force_attention=True)[0]
    return stage_output(hidden)


def stage_output(hidden: torch.Tensor | IntermediateTensors) -> torch.Tensor:
    """A pipeline stage's output as one tensor ``[num_tokens, hidden_size]``.

    Args:
        hidden: Hidden states of the last stage, or ``IntermediateTensors`` of another.
    """
    if isinstance(hidden, torch.Tensor):
        return hidden
    parts: list[torch.Tensor] = list(hidden.tensors.values())
    return torch.stack([part.float() for part in parts]).sum(0)
