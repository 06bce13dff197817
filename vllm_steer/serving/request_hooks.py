"""Hooks in vLLM's request path: steering becomes a plan before a response starts.

There are two steps. When an OpenAI-style request becomes sampling parameters, its steering is admitted, so
that errors are answered before a response starts, streaming or not. When the engine's input is made, the plan
is added; requests from ``LLM`` or elsewhere are admitted there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, TypeVar

from vllm.sampling_params import SamplingParams

from vllm_steer.errors import RequestError, UnsupportedError
from vllm_steer.request.schema import (
    FLAT_KEYS,
    PLAN_KEY,
    REQUEST_KEY,
    WRAPPERS,
    steering_keys,
    wrapped_steering,
)
from vllm_steer.serving.admission import (
    UNSTEERED,
    AdmittedPlan,
    Wanted,
    admission_of,
    current_admission,
)
from vllm_steer.serving.refusals import refusal
from vllm_steer.serving.request_plan import admitted, beam_search, wanted_of

if TYPE_CHECKING:
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest
    from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
    from vllm.entrypoints.serve.engine.serving import BaseServing
    from vllm.inputs import EngineInput, PromptType
    from vllm.pooling_params import PoolingParams
    from vllm.v1.engine import EngineCoreRequest
    from vllm.v1.engine.input_processor import InputProcessor

    BeamRequest = CompletionRequest | ChatCompletionRequest
    OpenAIRequest = BeamRequest | ResponsesRequest

R = TypeVar("R")

# The last request model, its extra arguments, and these with the top-level steering keys of its body.
_last: ContextVar[tuple[OpenAIRequest, dict[str, Any] | None, dict[str, Any]] | None] = ContextVar(
    "_last", default=None
)
# Set by vLLM's serving code just before it builds a request's sampling parameters.
_prompt_len: ContextVar[int | None] = ContextVar("_prompt_len", default=None)


def plan_inputs(
    original: Callable[..., EngineCoreRequest],
) -> Callable[..., EngineCoreRequest]:
    """Wraps ``InputProcessor.process_inputs`` to put the plan into the engine's request."""

    def process_inputs(
        self: InputProcessor,
        request_id: str,
        prompt: PromptType | EngineInput,
        params: SamplingParams | PoolingParams,
        *args: object,
        **kwargs: object,
    ) -> EngineCoreRequest:
        admission = admission_of(self)
        extra_args = getattr(params, "extra_args", None) or {}
        plan = extra_args.get(PLAN_KEY)
        wanted: Wanted | None = None
        if isinstance(plan, AdmittedPlan):
            wanted = plan.wanted
        elif plan is not UNSTEERED:
            wanted = wanted_of(admission, extra_args, generates=isinstance(params, SamplingParams))
        if wanted is not None and kwargs.get("resumable"):
            raise refusal(
                UnsupportedError(
                    "steering does not support resumable sessions; send the whole prompt"
                )
            )
        request = original(self, request_id, prompt, params, *args, **kwargs)
        found = request.sampling_params
        steers = wanted is not None or plan is UNSTEERED or REQUEST_KEY in extra_args
        # Pooling cannot be steered, and was refused above.
        if found is not None and steers:
            embeds, tokens = request.prompt_embeds, request.prompt_token_ids or ()
            prompt_len = len(tokens) if embeds is None else embeds.shape[0]
            if wanted is not None and (plan is None or plan.receipt.prompt_len != prompt_len):
                plan = admission.admit(wanted, prompt_len, found)
            if isinstance(plan, AdmittedPlan) and plan.receipt.plan.matches:
                if embeds is not None:
                    raise refusal(
                        UnsupportedError(
                            f"{REQUEST_KEY}.positions: a prompt of embeddings has no token ids; name positions, or send "
                            f"text or token ids"
                        )
                    )
                plan.receipt.prompt_tokens = tokens
            # A new dict: vLLM's copies of the parameters share the caller's.
            message = plan.message if isinstance(plan, AdmittedPlan) else None
            kept = _without_steering(extra_args)
            found.extra_args = kept | ({PLAN_KEY: message} if message else {})
            if isinstance(plan, AdmittedPlan) and plan.recompute:
                found.skip_reading_prefix_cache = True
        return request

    return process_inputs


def check_sampling(original: Callable[..., SamplingParams]) -> Callable[..., SamplingParams]:
    """Wraps ``to_sampling_params`` of an OpenAI-style request model."""

    def to_sampling_params(self: OpenAIRequest, *args: object, **kwargs: object) -> SamplingParams:
        params = original(self, *args, **kwargs)
        extra_args = _arguments(self, params)
        admission = current_admission()
        if admission is None:
            return params
        beam_search.set(False)
        wanted, prompt_len = wanted_of(admission, extra_args), _prompt_len.get()
        if prompt_len is None:
            if wanted is not None and not wanted.is_default:
                # A route that only renders a prompt for another server.
                raise refusal(
                    UnsupportedError(
                        "this route does not generate text; send the steering to the route that does"
                    )
                )
        elif wanted is not None:
            plan = admitted(admission, wanted, prompt_len, params)
            # Without the plan's input, which vLLM would deep-copy for every prompt.
            params.extra_args = _without_steering(extra_args) | {PLAN_KEY: plan}
        elif extra_args or admission.policy.default is not None:
            # Not to be checked again when it generates.
            params.extra_args = {**(params.extra_args or {}), PLAN_KEY: UNSTEERED}
        return params

    return to_sampling_params


def remember_prompt_len(original: Callable[..., int]) -> Callable[..., int]:
    """Wraps ``_extract_prompt_len``, since the request model does not have the prompt's length."""

    def _extract_prompt_len(self: BaseServing, prompt: EngineInput) -> int:
        length = original(self, prompt)
        _prompt_len.set(length)
        return length

    return _extract_prompt_len


def refuse_beam_search(original: Callable[..., R]) -> Callable[..., R]:
    """Wraps ``to_beam_search_params``: vLLM's beam search ignores a request's extra arguments."""

    def to_beam_search_params(self: BeamRequest, *args: object, **kwargs: object) -> R:
        extra_args = _with_top_level(self.vllm_xargs or {}, self)
        admission = current_admission()
        if admission is not None and wanted_of(admission, extra_args) is not None:
            raise refusal(
                UnsupportedError(
                    "steering does not support beam search; remove use_beam_search or the steering"
                )
            )
        # Its sampling parameters lack the request's arguments, so the default must not be applied.
        beam_search.set(True)
        return original(self, *args, **kwargs)

    return to_beam_search_params


def _without_steering(extra_args: dict[str, Any]) -> dict[str, Any]:
    kept = dict(extra_args)
    for key in (REQUEST_KEY, PLAN_KEY, *FLAT_KEYS):
        kept.pop(key, None)
    return kept


def _arguments(request: OpenAIRequest, params: SamplingParams) -> dict[str, Any]:
    """The extra arguments of a request with the top-level steering keys of its body, put together once for all prompts."""
    known = _last.get()
    if known is not None and known[0] is request and known[1] is params.extra_args:
        return known[2]
    found = _with_top_level(params.extra_args or {}, request)
    _last.set((request, params.extra_args, found))
    return found


def _with_top_level(given: Mapping[str, Any], request: OpenAIRequest) -> dict[str, Any]:
    """Adds the top-level steering keys of the request's body to extra arguments."""
    extra_args, unknown = dict(given), request.model_extra or {}
    # A body may have hundreds of thousands of keys.
    own = dict.fromkeys(steering_keys(unknown))
    wrapped = [key for key, value in unknown.items() if isinstance(value, dict) or key in WRAPPERS]
    for key in wrapped:
        if key not in own and wrapped_steering(unknown[key], text=key in WRAPPERS):
            raise refusal(
                RequestError(
                    f"{REQUEST_KEY}: is inside {key!r}, which this route does not read; send it beside 'model', or in "
                    f"vllm_xargs"
                )
            )
    for key in own:
        value = unknown[key]
        if key in extra_args:
            raise refusal(
                RequestError(f"{key!r} is both in the request and in vllm_xargs; send it once")
            )
        extra_args[key] = value
    return extra_args
