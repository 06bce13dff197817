"""Follows each steered prompt through the engine: counts its tokens, and waits for a free row."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sized
from contextlib import aclosing
from functools import partial
from typing import TYPE_CHECKING, Any

from vllm.sampling_params import RequestOutputKind, SamplingParams

from vllm_steer import log
from vllm_steer.config import ResolvedConfig
from vllm_steer.errors import BusyError, UnsupportedError
from vllm_steer.plan.scores import SCORES_ATTRIBUTE
from vllm_steer.request.schema import PLAN_KEY, REQUEST_KEY
from vllm_steer.serving import metrics
from vllm_steer.serving.admission import UNSTEERED, Admission, AdmittedPlan, admission_of
from vllm_steer.serving.engine_requests import EnginePrompt, arriving, forget
from vllm_steer.serving.http_context import current_http_context
from vllm_steer.serving.receipt import Receipt
from vllm_steer.serving.refusals import refusal
from vllm_steer.serving.request_plan import admitted, wanted_of
from vllm_steer.serving.row_queue import RowQueue, Ticket
from vllm_steer.serving.scores import observe_scores
from vllm_steer.vllm_compat.attached import Attached

if TYPE_CHECKING:
    from vllm.inputs import EngineInput, PromptType
    from vllm.outputs import RequestOutput
    from vllm.v1.engine.async_llm import AsyncLLM

    # The input of a request: a prompt, or its tokens.
    Prompt = PromptType | EngineInput
    Outputs = AsyncGenerator[RequestOutput, None]

_ROW_QUEUE = Attached[RowQueue]("row_queue")


def follow(original: Callable[..., Outputs]) -> Callable[..., Outputs]:
    """Wraps ``AsyncLLM.generate``; an unsteered request gets vLLM's own generator."""

    def generate(
        self: AsyncLLM,
        prompt: Prompt,
        sampling_params: SamplingParams,
        request_id: str,
        **kwargs: object,
    ) -> Outputs:
        plan = _plan(self, prompt, sampling_params)
        outputs = original(self, prompt, sampling_params, request_id, **kwargs)
        if plan is None:
            return outputs
        admission = admission_of(self.input_processor)
        config = admission.config
        if config is None:
            raise RuntimeError("a request was admitted by an engine without steering")
        adds_up = sampling_params.output_kind == RequestOutputKind.DELTA
        entry = _entry(plan, request_id) if self.log_requests else None
        queue, seconds = _row_queue_of(self, config), config.wait_seconds
        followed = _followed(outputs, plan, queue, seconds, adds_up, entry)
        if plan.receipt.plan.reads:
            followed = _measured(followed, plan.receipt, admission)
        # The HTTP request may end before the engine's request does.
        return _pinned(followed, plan.receipt, admission)

    return generate


def _plan(engine: AsyncLLM, prompt: Prompt, sampling_params: SamplingParams) -> AdmittedPlan | None:
    """The plan of a steered request, made here for routes without earlier admission.

    Raises:
        VLLMValidationError: It cannot be carried out.
    """
    extra_args = getattr(sampling_params, "extra_args", None) or {}
    plan = extra_args.get(PLAN_KEY)
    admission = admission_of(engine.input_processor)
    tokens = prompt.get("prompt_token_ids") if isinstance(prompt, dict) else None
    if isinstance(plan, AdmittedPlan):
        if isinstance(tokens, Sized) and len(tokens) != plan.receipt.prompt_len:
            # A further turn, with what tools have said: other rows may be needed.
            plan = admitted(admission, plan.wanted, len(tokens), sampling_params)
            sampling_params.extra_args = extra_args | {PLAN_KEY: plan}
        return plan
    if plan is UNSTEERED:
        return None
    if admission.config is None or not admission.config.queued:
        # The engine's front end handles it next: it refuses the steering, or none is needed.
        return None
    wanted = wanted_of(admission, extra_args, generates=isinstance(sampling_params, SamplingParams))
    if wanted is None:
        return None
    if not isinstance(tokens, Sized):
        raise refusal(
            UnsupportedError("prompts of this kind cannot be steered; send text or token ids")
        )
    plan = admitted(admission, wanted, len(tokens), sampling_params)
    sampling_params.extra_args = extra_args | {PLAN_KEY: plan}
    return plan


def _row_queue_of(engine: AsyncLLM, config: ResolvedConfig) -> RowQueue:
    """The queue of an engine, made with its first steered request."""
    # Admission lets one request take all rows; the queue shares them.
    sums = config.sums_per_request if config.queued else config.rows - 1
    return _ROW_QUEUE.get_or_make(engine, partial(RowQueue, sums))


def _entry(plan: AdmittedPlan, request_id: str) -> dict[str, Any]:
    """Fields of a request's log line that are known before it runs."""
    http_context = current_http_context.get()
    shown = plan.receipt.to_json()
    directions = [{k: v for k, v in d.items() if k != "layers"} for d in shown["directions"]]
    return {
        "request_id": request_id,
        "directions": directions,
        "dose": shown["dose"],
        "dose_factor": shown["dose_factor"],
        "key": log.short_key(http_context.key_digest) if http_context else None,
    }


async def _measured(outputs: Outputs, receipt: Receipt, admission: Admission) -> Outputs:
    """Yields the outputs of a request with reads, and records its scores in the metrics at the end."""
    reads = receipt.plan.reads
    units = [admission.unit_of(read) for read in reads]
    names = [admission.metric_name_of(read) for read in reads]
    try:
        async with aclosing(outputs):
            async for output in outputs:
                yield output
    finally:
        observe_scores(receipt.scores.values(), units, names)


async def _pinned(outputs: Outputs, receipt: Receipt, admission: Admission) -> Outputs:
    """Yields the outputs of a request and keeps its content loaded meanwhile.

    Raises:
        VLLMValidationError: The content was unloaded after the request was admitted.
    """
    admission.pin(receipt)
    try:
        admission.check_content(receipt)
        async with aclosing(outputs):
            async for output in outputs:
                yield output
    finally:
        admission.unpin(receipt)


async def _entered(queue: RowQueue, sums: set[str], seconds: float) -> Ticket:
    """Waits for rows; without a time limit if there is no HTTP client that could retry.

    Raises:
        VLLMValidationError: None became free in time; the client is answered with 503.
    """
    http_context = current_http_context.get()
    owner = http_context.key_digest if http_context else None
    patient = http_context is None or http_context.patient
    try:
        ticket = await queue.enter(owner, sums, None if patient else seconds)
    except TimeoutError:
        error = BusyError(
            f"{REQUEST_KEY}: no row became free within {seconds:g} s; retry later, or raise --steering-rows"
        )
        if http_context is not None:
            http_context.busy = str(error)
        raise refusal(error) from None
    if http_context is not None:
        http_context.let_in = True
    return ticket


async def _noted(outputs: Outputs, prompt: EnginePrompt) -> Outputs:
    """Yields the outputs of vLLM, which adds the request before it yields the first."""
    async with aclosing(outputs):
        token = arriving.set(prompt)
        try:
            first = await anext(outputs, None)
        finally:
            # Before anything is yielded, since a generator has no separate context.
            arriving.reset(token)
        if first is not None:
            yield first
            async for output in outputs:
                yield output


async def _followed(
    outputs: Outputs,
    plan: AdmittedPlan,
    queue: RowQueue,
    seconds: float,
    adds_up: bool,
    entry: dict[str, Any] | None,
) -> Outputs:
    """Yields the outputs of one steered prompt.

    Args:
        outputs: The outputs of vLLM.
        plan: The prompt's plan.
        queue: The queue of its engine.
        seconds: How long it waits there.
        adds_up: Whether each output holds only the new tokens, or all of them.
        entry: Fields of the request's log line, None if vLLM does not log requests.
    """
    receipt = plan.receipt
    sums = set(receipt.plan.sums)
    answered = receipt.answered
    outcome, reason = "error", None
    metrics.ACTIVE.inc()
    if receipt.plan.segments or not receipt.plan.reads:
        metrics.DOSE.observe(receipt.dose)
    try:
        with metrics.WAITING.track_inprogress():
            ticket = await _entered(queue, sums, seconds)
        prompt = EnginePrompt(receipt.num_choices, partial(queue.leave, ticket))
        try:
            # Closed here, so that a request whose client disconnected leaves the engine before its rows are
            # reused.
            async with aclosing(_noted(outputs, prompt)) as noted:
                async for output in noted:
                    for answer in output.outputs:
                        before = answered.get(answer.index, 0) if adds_up else 0
                        receipt.count(answer.index, answer.token_ids, before)
                        if (scores := getattr(answer, SCORES_ATTRIBUTE, None)) is not None:
                            receipt.scores[answer.index] = scores
                    yield output
            outcome = "finished"
        finally:
            forget(prompt)
            if prompt.ended < prompt.answers:
                queue.leave(ticket)
    except (asyncio.CancelledError, GeneratorExit):
        outcome = "aborted"
        raise
    except Exception as error:
        reason = type(error).__name__
        raise
    finally:
        tokens = receipt.tokens_steered()
        metrics.ACTIVE.dec()
        metrics.REQUESTS.labels(outcome).inc()
        metrics.STEERED_TOKENS.inc(tokens)
        if entry is not None:
            log.REQUEST.write(**entry, outcome=outcome, reason=reason, tokens_steered=tokens)
