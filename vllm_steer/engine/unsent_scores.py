"""Scores in the engine core: from the steps that computed them to the tokens that are sent to the front end.

vLLM's scheduler takes in the output of each step. The scores in it are kept at their request, by absolute position,
until its next tokens are sent, and go with them: those of all tokens but the last, which the model has not read
yet. Draft tokens that were rejected lie beyond that and are dropped; what was computed twice, after a preemption,
has the same position and counts once. Where a probe may end the answer, it is looked at as each token is accepted,
so the answer ends at the same token however many a step accepts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from vllm.v1.request import RequestStatus

from vllm_steer.plan.message import plan_of
from vllm_steer.plan.reads import Read, Stop, stop_reason
from vllm_steer.plan.scores import CARRIER, pack_scores

# Where a ``ModelRunnerOutput`` has the scores of its step.
SCORES = "_vllm_steer_scores"
# Where a request of the scheduler has those that were not sent.
_UNSENT = "_vllm_steer_unsent"
# Each reading request's positions, int64 ``[tokens]``, and scores, float32 ``[reads, tokens]``.
StepScores = dict[str, tuple[np.ndarray, np.ndarray]]


@dataclass(eq=False)
class UnsentScores:
    """Scores of one request that were computed and not yet sent, and how far its rules have looked.

    Attributes:
        reads: What it reads.
        stops: By which of them its answer ends.
        start: Positions before it were sent.
        chunks: Positions and scores of the steps since, in their order.
        looked: Positions before it were looked at by the rules.
        runs: Tokens in a row, up to there, that each rule is met by.
    """

    reads: tuple[Read, ...]
    stops: tuple[Stop, ...] = ()
    start: int = 0
    chunks: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)
    looked: int = 0
    runs: list[int] = field(default_factory=list)

    def take(self, end: int) -> tuple[int, np.ndarray] | None:
        """Takes the scores of all positions before one; what lies beyond was not accepted.

        Args:
            end: Position after the last one.

        Returns:
            The first position, and float32 ``[reads, tokens]`` from there to ``end``, NaN where nothing was computed;
            None where there is nothing to send.
        """
        start, end = self.start, max(self.start, end)
        scores = self._between(start, end)
        self.start, self.chunks = end, []
        return None if np.isnan(scores).all() else (start, scores)

    def fired(self, end: int) -> Stop | None:
        """Looks at the scores of all positions before one that were not looked at.

        Args:
            end: Position after the last one.

        Returns:
            The first rule that was met.
        """
        scores = self._between(self.looked, max(self.looked, end))
        self.looked = max(self.looked, end)
        if not scores.size:
            return None
        above = [scores[stop.read] > stop.above for stop in self.stops]
        if not self.runs or not np.any(above):
            self.runs = [0] * len(self.stops)
        if not np.any(above):
            return None
        for met in zip(*above, strict=True):
            self.runs = [run + 1 if now else 0 for run, now in zip(self.runs, met, strict=True)]
            for run, stop in zip(self.runs, self.stops, strict=True):
                if run >= stop.tokens:
                    return stop
        return None

    def _between(self, start: int, end: int) -> np.ndarray:
        """Float32 ``[reads, end - start]``, NaN where nothing was computed; of two computations the later counts."""
        scores = np.full((len(self.reads), end - start), np.nan, dtype=np.float32)
        for positions, values in self.chunks:
            kept = (positions >= start) & (positions < end)
            scores[:, positions[kept] - start] = values[:, kept]
        return scores


def send_scores(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps ``Scheduler.update_from_output``, which makes the outputs of a step for the front end."""

    def update_from_output(self: Any, scheduler_output: Any, model_runner_output: Any) -> Any:
        found: StepScores | None = getattr(model_runner_output, SCORES, None)
        if found is None:
            return original(self, scheduler_output, model_runner_output)
        # A request that ends in this step is forgotten meanwhile.
        requests = {key: self.requests[key] for key in found if key in self.requests}
        for request_id, request in requests.items():
            _unsent(request).chunks.append(found[request_id])
        outputs = original(self, scheduler_output, model_runner_output)
        for output in (each for sent in outputs.values() for each in sent.outputs):
            if output.request_id not in requests:
                continue
            request = requests[output.request_id]
            # Its tokens are those that were accepted.
            taken = _unsent(request).take(request.num_tokens - 1)
            if taken is not None:
                carried = output.kv_transfer_params or {}
                output.kv_transfer_params = {**carried, CARRIER: pack_scores(*taken)}
        return outputs

    return update_from_output


def stop_by_scores(original: Callable[..., bool]) -> Callable[..., bool]:
    """Wraps ``check_stop``, which the scheduler asks after each token that it adds to a request."""

    def check_stop(request: Any, *args: Any, **kwargs: Any) -> bool:
        if original(request, *args, **kwargs):
            return True
        unsent: UnsentScores | None = getattr(request, _UNSENT, None)
        if unsent is None or not unsent.stops:
            return False
        stop = unsent.fired(request.num_tokens - 1)
        if stop is None:
            return False
        request.status = (
            RequestStatus.FINISHED_ABORTED if stop.abort else RequestStatus.FINISHED_STOPPED
        )
        request.stop_reason = stop_reason(unsent.reads[stop.read], stop.above)
        return True

    return check_stop


def _unsent(request: Any) -> UnsentScores:
    """What a request of the scheduler has not sent, made with its first scores."""
    if not hasattr(request, _UNSENT):
        plan = plan_of(request.sampling_params)
        if plan is None:
            raise RuntimeError(f"request {request.request_id} has scores and reads nothing")
        setattr(request, _UNSENT, UnsentScores(plan.reads, plan.stops))
    found: UnsentScores = getattr(request, _UNSENT)
    return found
