"""Adapter for vLLM's V1 model runners (``GPUModelRunner`` and its CPU subclass).

The methods are wrapped on the one runner instance, so an engine without steering in the same
process runs vLLM's code untouched.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.config import CUDAGraphMode

from vllm_steer.engine.reading import carry_scores
from vllm_steer.engine.worker import WorkerSteering


def attach(runner: Any, steering: WorkerSteering) -> None:
    """Feeds the steering from a V1 runner.

    Args:
        runner: The loaded ``GPUModelRunner``.
        steering: The worker's steering.
    """
    update_states, prepare_inputs, dummy_run = (
        runner._update_states,
        runner._prepare_inputs,
        runner._dummy_run,
    )

    def _update_states(scheduler_output: Any) -> Any:
        result = update_states(scheduler_output)
        for request_id in scheduler_output.finished_req_ids:
            steering.remove_request(request_id)
        # A preempted request keeps its entry: V1 resumes it without sending its parameters again.
        for request in scheduler_output.scheduled_new_reqs:
            steering.add_request(request.req_id, request.sampling_params)
        return result

    def _prepare_inputs(scheduler_output: Any, num_scheduled_tokens: Any) -> Any:
        result = prepare_inputs(scheduler_output, num_scheduled_tokens)
        # Read here, after _update_states: rows of the batch were reordered and condensed by it.
        batch = runner.input_batch
        steering.prepare_step(
            batch.req_ids,
            batch.num_computed_tokens_cpu,
            num_scheduled_tokens,
            runner.positions,
            runner.input_ids.gpu,
        )
        return result

    def _dummy_run(*args: Any, **kwargs: Any) -> Any:
        steering.prepare_dummy_step()
        return dummy_run(*args, **kwargs)

    runner._update_states = _update_states
    runner._prepare_inputs = _prepare_inputs
    runner._dummy_run = _dummy_run
    if steering.reading is not None:
        carry_scores(runner, steering.reading)


def dummy_hidden_states(runner: Any, num_tokens: int, *, graphs: bool = True) -> torch.Tensor:
    """Final hidden states ``[num_tokens, hidden_size]`` of a dummy run, for the self-tests.

    Args:
        runner: The runner.
        num_tokens: Tokens of the run.
        graphs: Whether CUDA graphs may be replayed; none may before they are captured.
    """
    mode = {} if graphs else {"cudagraph_runtime_mode": CUDAGraphMode.NONE}
    # With attention: without its metadata a backend may leave the output uninitialised.
    hidden = runner._dummy_run(num_tokens, force_attention=True, **mode)[0]
    return stage_output(hidden)


def stage_output(hidden: Any) -> torch.Tensor:
    """What a pipeline stage hands on, as one tensor ``[num_tokens, hidden_size]``.

    Args:
        hidden: Hidden states of the last stage, or ``IntermediateTensors`` of another.
    """
    if isinstance(hidden, torch.Tensor):
        return hidden
    parts: list[torch.Tensor] = list(hidden.tensors.values())
    return torch.stack([part.float() for part in parts]).sum(0)
