"""Scores in the front end: taken from the engine's outputs, and passed on with their answers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from vllm_steer.plan.reads import stop_reason
from vllm_steer.plan.scores import CARRIER, SCORES_ATTRIBUTE, Scores, unpack_scores
from vllm_steer.serving import metrics
from vllm_steer.vllm_compat.attached import Attached

if TYPE_CHECKING:
    from vllm.v1.engine.output_processor import RequestState

    from vllm_steer.plan.steering_plan import SteeringPlan

# Scores of a request in the output processor.
_SCORES = Attached[Scores]("scores")

# Directions that the metrics tell apart; packs may come and go.
_MOST_NAMES = 64
_OTHERS = "others"
_named: set[str] = set()


def expect_scores(state: RequestState, plan: SteeringPlan) -> None:
    """Prepares for the scores of a request that vLLM's output processor has added.

    Args:
        state: The processor's state of the request.
        plan: The request's plan, which reads.
    """
    _SCORES.set(state, Scores(plan.reads, state.prompt_len, plan.rules))


def take_scores(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps ``OutputProcessor.process_outputs`` to take the scores from the engine's outputs."""

    def process_outputs(self: Any, engine_core_outputs: Any, *args: Any, **kwargs: Any) -> Any:
        for output in engine_core_outputs:
            if output.finish_reason is not None:
                _count_stop(self.request_states.get(output.request_id), output)
            carried = output.kv_transfer_params
            if not carried or CARRIER not in carried:
                continue
            rest = {key: value for key, value in carried.items() if key != CARRIER}
            output.kv_transfer_params = rest or None
            for request_id, start, found in unpack_scores(carried[CARRIER]):
                # A request aborted meanwhile is gone.
                scores = _SCORES.get(self.request_states.get(request_id))
                if scores is not None:
                    scores.add(start, found)
        return original(self, engine_core_outputs, *args, **kwargs)

    return process_outputs


def observe_scores(answers: Iterable[Scores], units: Sequence[float], names: Sequence[str]) -> None:
    """Records the largest score of each answer and read in the metrics.

    Args:
        answers: The scores of the answers to a prompt.
        units: Unit of each read's scores.
        names: What each is called in the metrics.
    """
    for scores in answers:
        found = scores.since(scores.prompt_len)
        for name, row, unit in zip(names, found, units, strict=True):
            finite = row[np.isfinite(row)]
            if len(finite):
                label = name if name in _named or len(_named) < _MOST_NAMES else _OTHERS
                _named.add(label)
                metrics.READ_SCORE.labels(label).observe(float(finite.max()) / unit)


def _count_stop(state: Any, output: Any) -> None:
    """Counts an answer ended by a probe."""
    scores = _SCORES.get(state)
    if scores is not None and output.stop_reason in {
        stop_reason(scores.reads[stop.read], stop.above) for stop in scores.rules
    }:
        metrics.STOPPED.labels(str(output.finish_reason)).inc()


def hand_on_scores(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps ``RequestState._new_completion_output`` to give each ``CompletionOutput`` the scores of its answer.

    Outputs of one answer share them, so vLLM may merge outputs.
    """

    def _new_completion_output(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = original(self, *args, **kwargs)
        scores = _SCORES.get(self)
        if scores is not None:
            setattr(output, SCORES_ATTRIBUTE, scores)
        return output

    return _new_completion_output
