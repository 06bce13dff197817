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
from typing import TYPE_CHECKING, Any

import numpy as np
from vllm.v1.request import RequestStatus

from vllm_steer.plan.message import plan_of
from vllm_steer.plan.reads import Read, StopRule, stop_reason
from vllm_steer.plan.scores import CARRIER, pack_scores
from vllm_steer.vllm_compat.attached import Attached

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.engine import EngineCoreOutputs
    from vllm.v1.outputs import ModelRunnerOutput
    from vllm.v1.request import Request

    Outputs = dict[int, EngineCoreOutputs]

# Each reading request's positions, int64 ``[tokens]``, and scores, float32 ``[reads, tokens]``.
StepScores = dict[str, tuple[np.ndarray, np.ndarray]]
# Of the step that a ``ModelRunnerOutput`` is of.
STEP_SCORES = Attached[StepScores]("scores")


@dataclass(eq=False)
class UnsentScores:
    """Scores of one request that were computed and not yet sent, and how far its rules have looked.

    Attributes:
        reads: What it reads.
        rules: By which of them its answer ends.
        start: Positions before it were sent.
        chunks: Positions and scores of the steps since, in their order.
        looked: Positions before it were looked at by the rules.
        runs: Tokens in a row, up to there, that each rule is met by.
    """

    reads: tuple[Read, ...]
    rules: tuple[StopRule, ...] = ()
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

    def fired(self, end: int) -> StopRule | None:
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
        above = [scores[stop.read] > stop.above for stop in self.rules]
        if not self.runs or not np.any(above):
            self.runs = [0] * len(self.rules)
        if not np.any(above):
            return None
        for met in zip(*above, strict=True):
            self.runs = [run + 1 if now else 0 for run, now in zip(self.runs, met, strict=True)]
            for run, stop in zip(self.runs, self.rules, strict=True):
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


# Of a request of the scheduler.
_UNSENT = Attached[UnsentScores]("unsent_scores")


def send_scores(original: Callable[..., Outputs]) -> Callable[..., Outputs]:
    """Wraps ``Scheduler.update_from_output``, which makes the outputs of a step for the front end."""

    def update_from_output(
        self: Scheduler, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> Outputs:
        found = STEP_SCORES.get(model_runner_output)
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

    def check_stop(request: Request, *args: Any, **kwargs: Any) -> bool:
        if original(request, *args, **kwargs):
            return True
        unsent = _UNSENT.get(request)
        if unsent is None or not unsent.rules:
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


def _unsent(request: Request) -> UnsentScores:
    """What a request of the scheduler has not sent, made with its first scores."""

    def make() -> UnsentScores:
        plan = plan_of(request.sampling_params)
        if plan is None:
            raise RuntimeError(f"request {request.request_id} has scores and reads nothing")
        return UnsentScores(plan.reads, plan.rules)

    return _UNSENT.get_or_make(request, make)
