"""Scores in the engine core: from the steps that computed them to the tokens that are sent to the front end.

vLLM's scheduler takes in the output of each step. The scores in it are kept by absolute position until the
request's next tokens are sent, and go with them: those of all tokens but the last, which the model has not read
yet. Draft tokens that were rejected lie beyond that and are dropped; what was computed twice, after a preemption,
has the same position and counts once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vllm_steer.plan.scores import CARRIER, pack_scores

# Where a ``ModelRunnerOutput`` has the scores of its step.
SCORES = "_vllm_steer_scores"
# Each reading request's positions, int64 ``[tokens]``, and scores, float32 ``[reads, tokens]``.
StepScores = dict[str, tuple[np.ndarray, np.ndarray]]


@dataclass(eq=False)
class Unsent:
    """Scores of one request that were computed and not yet sent.

    Attributes:
        start: Positions before it were sent.
        chunks: Positions and scores of the steps since, in their order.
    """

    start: int = 0
    chunks: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)

    def take(self, end: int) -> tuple[int, np.ndarray] | None:
        """Takes the scores of all positions before one; what lies beyond was not accepted.

        Args:
            end: Position after the last one.

        Returns:
            The first position, and float32 ``[reads, tokens]`` from there to ``end``, NaN where nothing was computed;
            None where there is nothing to send.
        """
        start, chunks = self.start, self.chunks
        self.start, self.chunks = max(start, end), []
        if not chunks or end <= start:
            return None
        scores = np.full((len(chunks[0][1]), end - start), np.nan, dtype=np.float32)
        for positions, values in chunks:
            kept = (positions >= start) & (positions < end)
            scores[:, positions[kept] - start] = values[:, kept]
        return start, scores


def send_scores(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps ``Scheduler.update_from_output``, which makes the outputs of a step for the front end."""

    def update_from_output(self: Any, scheduler_output: Any, model_runner_output: Any) -> Any:
        found: StepScores = getattr(model_runner_output, SCORES, None) or {}
        ledger: dict[str, Unsent] = self.__dict__.setdefault("_vllm_steer_ledger", {})
        if not found and not ledger:
            return original(self, scheduler_output, model_runner_output)
        for request_id, chunk in found.items():
            if request_id in self.requests:
                ledger.setdefault(request_id, Unsent()).chunks.append(chunk)
        requests = {request_id: self.requests.get(request_id) for request_id in ledger}
        outputs = original(self, scheduler_output, model_runner_output)
        for output in (each for sent in outputs.values() for each in sent.outputs):
            request = requests.get(output.request_id)
            if request is None:
                continue
            # Drafts that were not accepted are no tokens of the request.
            taken = ledger[output.request_id].take(request.num_tokens - 1)
            if taken is not None:
                carried = output.kv_transfer_params or {}
                output.kv_transfer_params = {**carried, CARRIER: pack_scores(*taken)}
        for request_id in requests:
            if request_id not in self.requests:
                del ledger[request_id]
        return outputs

    return update_from_output
