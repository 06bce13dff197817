"""Scores between pipeline stages: sent with the hidden states, so the last stage has all of them."""

from __future__ import annotations

from typing import Any

from vllm.sequence import IntermediateTensors

from vllm_steer.engine.reading import Reading
from vllm_steer.vllm_compat.patches import override

# Key among the tensors that one stage sends to the next.
STAGE_SCORES = "_vllm_steer_scores"


def hand_on_stage_scores(runner: Any, reading: Reading) -> None:
    """Makes a model runner receive the scores of earlier stages, and pass them on with its own.

    Args:
        runner: A model runner of vLLM, of a pipeline stage.
        reading: The worker's reads.
    """
    execute_model = runner.execute_model

    def _execute_model(
        scheduler_output: Any,
        intermediate_tensors: IntermediateTensors | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        if intermediate_tensors is not None:
            # Removed before the runner copies known tensors into its buffers.
            reading.receive(intermediate_tensors.tensors.pop(STAGE_SCORES, None))
        output = execute_model(scheduler_output, intermediate_tensors, *args, **kwargs)
        if isinstance(output, IntermediateTensors):
            scores = reading.hand_on()
            if scores is not None:
                # A copy: the runner may return the same tensors at every step.
                return IntermediateTensors({**output.tensors, STAGE_SCORES: scores})
        return output

    override(runner, execute_model=_execute_model)
