"""Scores in the engine core: from the steps that computed them to the tokens sent to the front end.

vLLM's scheduler processes the output of each step. Its scores are stored with their request, by absolute
position, until the next tokens are sent, and are sent with them: those of all tokens except the last, which
the model has not yet read. Rejected draft tokens lie beyond that and are dropped; scores computed twice,
after a preemption, have the same position and count once. If a probe may end the answer, it is checked as
each token is accepted, so the answer ends at the same token however many a step accepts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from vllm.v1.request import RequestStatus

from vllm_steer.engine.step_scores import StepScores
from vllm_steer.plan.message import plan_of
from vllm_steer.plan.reads import Read, StopRule, stop_reason
from vllm_steer.plan.scores import CARRIER, pack_scores
from vllm_steer.vllm_compat.attached import Attached

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
    from vllm.v1.outputs import ModelRunnerOutput
    from vllm.v1.request import Request

    Outputs = dict[int, EngineCoreOutputs]

# Scores of the step of a ``ModelRunnerOutput``.
STEP_SCORES = Attached[StepScores]("scores")


@dataclass(eq=False)
class UnsentScores:
    """Scores of one request that were computed but not yet sent, and the state of its rules.

    Attributes:
        reads: Its reads.
        rules: Rules by which reads end its answer.
        start: Positions before this were sent; None before anything was.
        chunks: First position and scores, float32 ``[tokens, reads]``, of the steps since, in order.
        looked: Positions before this were checked by the rules.
        runs: Consecutive tokens, up to there, that meet each rule.
    """

    reads: tuple[Read, ...]
    rules: tuple[StopRule, ...] = ()
    start: int | None = None
    chunks: list[tuple[int, np.ndarray]] = field(default_factory=list)
    looked: int = 0
    runs: list[int] = field(default_factory=list)

    def take(self, end: int) -> tuple[int, np.ndarray] | None:
        """Removes and returns the scores of all positions before one; later ones were not accepted.

        Args:
            end: Position after the last one.

        Returns:
            The first position, and float32 ``[tokens, reads]`` from there to ``end``, NaN where nothing was
            computed; None if there is nothing to send.
        """
        chunks, start = self.chunks, self.start
        if not chunks:
            return None
        self.chunks = []
        if start is None:
            start = min(begin for begin, _ in chunks)
        if end <= start:
            return None
        self.start = end
        begin, values = chunks[-1]
        if begin == start and len(values) == end - start:
            return start, values
        scores, computed = _between(chunks, start, end)
        return (start, scores) if computed.any() else None

    def fired(self, end: int) -> StopRule | None:
        """Checks the unchecked scores of all positions before one.

        Args:
            end: Position after the last one.

        Returns:
            The first rule met.
        """
        start = self.looked
        if end <= start or not self.chunks:
            return None
        self.looked = end
        begin, values = self.chunks[-1]
        if begin <= start and end <= begin + len(values):
            scores, computed = values[start - begin : end - begin], None
        else:
            scores, computed = _between(self.chunks, start, end)
        positions = np.arange(start, end)
        above = []
        for stop in self.rules:
            met = (scores[:, stop.read] > stop.above) & self.reads[stop.read].covers(positions)
            above.append((met if computed is None else met & computed).tolist())
        runs = self.runs or [0] * len(self.rules)
        for met in zip(*above, strict=True):
            runs = [run + 1 if now else 0 for run, now in zip(runs, met, strict=True)]
            for run, stop in zip(runs, self.rules, strict=True):
                if run >= stop.tokens:
                    self.runs = runs
                    return stop
        self.runs = runs
        return None


def _between(
    chunks: Sequence[tuple[int, np.ndarray]], start: int, end: int
) -> tuple[np.ndarray, np.ndarray]:
    """Scores by position; of two computations the later one counts.

    Returns:
        Float32 ``[end - start, reads]``, NaN where nothing was computed, and bool ``[end - start]``, where it was.
    """
    width = max(values.shape[1] for _, values in chunks)
    scores = np.full((end - start, width), np.nan, dtype=np.float32)
    computed = np.zeros(end - start, dtype=bool)
    for begin, values in chunks:
        low, high = max(begin, start), min(begin + len(values), end)
        if low < high:
            scores[low - start : high - start, : values.shape[1]] = values[
                low - begin : high - begin
            ]
            computed[low - start : high - start] = True
    return scores, computed


# Unsent scores of a request of the scheduler.
_UNSENT = Attached[UnsentScores]("unsent_scores")


def send_scores(original: Callable[..., Outputs]) -> Callable[..., Outputs]:
    """Wraps ``Scheduler.update_from_output``, which builds a step's outputs for the front end."""

    def update_from_output(
        self: Scheduler, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> Outputs:
        found = STEP_SCORES.get(model_runner_output)
        if found is None:
            return original(self, scheduler_output, model_runner_output)
        # A request that ends in this step is removed meanwhile.
        reading: dict[str, tuple[Request, UnsentScores]] = {}
        at = 0
        for request_id, start, count in zip(
            found.request_ids, found.starts, found.counts, strict=True
        ):
            request = self.requests.get(request_id)
            if request is not None:
                unsent = _unsent(request)
                if count:
                    unsent.chunks.append((start, found.values[at : at + count]))
                reading[request_id] = request, unsent
            at += count
        outputs = original(self, scheduler_output, model_runner_output)
        for sent in outputs.values():
            _send(sent.outputs, reading)
        return outputs

    return update_from_output


def _send(
    outputs: Sequence[EngineCoreOutput], reading: Mapping[str, tuple[Request, UnsentScores]]
) -> None:
    """Puts the scores of all tokens for one front end into one message, in the first of its outputs."""
    taken = []
    for output in outputs:
        pair = reading.get(output.request_id)
        if pair is None:
            continue
        request, unsent = pair
        # Its tokens are the accepted ones.
        scores = unsent.take(request.num_tokens - 1)
        if scores is not None:
            taken.append((output.request_id, *scores))
    if taken:
        first = outputs[0]
        first.kv_transfer_params = {
            **(first.kv_transfer_params or {}),
            CARRIER: pack_scores(taken),
        }


def stop_by_scores(original: Callable[..., bool]) -> Callable[..., bool]:
    """Wraps ``check_stop``, which the scheduler asks after each token that it adds to a request.

    A rule that is met counts before what else ends the answer with the same token, as the most tokens that its client
    asked for: an operator is told of it all the same.
    """

    def check_stop(request: Request, *args: Any, **kwargs: Any) -> bool:
        ended = original(request, *args, **kwargs)
        unsent = _UNSENT.get(request)
        if unsent is None or not unsent.rules:
            return ended
        stop = unsent.fired(request.num_tokens - 1)
        if stop is None:
            return ended
        request.status = (
            RequestStatus.FINISHED_ABORTED if stop.abort else RequestStatus.FINISHED_STOPPED
        )
        request.stop_reason = stop_reason(unsent.reads[stop.read], stop.above)
        return True

    return check_stop


def _unsent(request: Request) -> UnsentScores:
    """The unsent scores of a request of the scheduler, made with its first scores."""

    def make() -> UnsentScores:
        plan = plan_of(request.sampling_params)
        if plan is None:
            raise RuntimeError(f"request {request.request_id} has scores and reads nothing")
        return UnsentScores(plan.reads, plan.rules)

    return _UNSENT.get_or_make(request, make)
