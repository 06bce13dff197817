"""Adapter for vLLM's Model Runner V2, through its ``ModelState``.

The methods are wrapped on the state instance, so an engine without steering in the same process runs
unmodified vLLM code.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from vllm_steer.engine.reading import carry_scores
from vllm_steer.engine.stage_scores import hand_on_stage_scores
from vllm_steer.engine.worker import WorkerSteering
from vllm_steer.vllm_compat.patched_symbols import V2_MODEL_STATE
from vllm_steer.vllm_compat.patches import check_methods, override

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import NewRequestData
    from vllm.v1.worker.gpu.input_batch import InputBatch
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner


def attach(runner: GPUModelRunner, steering: WorkerSteering) -> None:
    """Connects a V2 runner to the steering.

    Args:
        runner: The runner, with its model loaded.
        steering: The worker's steering.
    """
    state = runner.model_state
    check_methods(state, V2_MODEL_STATE)
    add_request, remove_request = state.add_request, state.remove_request
    preprocess_state, prepare_inputs = state.preprocess_state, state.prepare_inputs
    prepare_dummy_inputs = state.prepare_dummy_inputs
    # preprocess_state runs for real batches only, prepare_inputs for real and dummy ones after it.
    real_batch = False

    def _add_request(req_index: int, new_req_data: NewRequestData) -> None:
        tokens = new_req_data.prefill_token_ids or ()
        steering.add_request(new_req_data.req_id, new_req_data.sampling_params, tokens)
        add_request(req_index, new_req_data)

    def _remove_request(req_id: str) -> None:
        steering.remove_request(req_id)
        remove_request(req_id)

    def _preprocess_state(input_batch: InputBatch, *args: Any, **kwargs: Any) -> None:
        nonlocal real_batch
        real_batch = True
        steering.prepare_step(
            input_batch.req_ids,
            input_batch.num_computed_tokens_np,
            input_batch.num_scheduled_tokens,
            input_batch.positions,
            input_batch.input_ids,
        )
        preprocess_state(input_batch, *args, **kwargs)

    def _prepare_inputs(*args: Any, **kwargs: Any) -> dict[str, Any]:
        nonlocal real_batch
        if not real_batch:
            steering.prepare_dummy_step()
        real_batch = False
        return prepare_inputs(*args, **kwargs)

    def _prepare_dummy_inputs(*args: Any, **kwargs: Any) -> dict[str, Any]:
        steering.prepare_dummy_step()
        return prepare_dummy_inputs(*args, **kwargs)

    override(
        state,
        add_request=_add_request,
        remove_request=_remove_request,
        preprocess_state=_preprocess_state,
        prepare_inputs=_prepare_inputs,
        prepare_dummy_inputs=_prepare_dummy_inputs,
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
        graphs: Whether CUDA graphs may be replayed; this runner only replays captured ones.
    """
    hidden: torch.Tensor = runner._dummy_run(num_tokens)[0]
    return hidden
