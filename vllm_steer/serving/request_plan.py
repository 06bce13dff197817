"""The steering of a request and its plan: one function for every entry point.

Chat, completions, responses, messages, batches, ``/invocations``, token-in routes, ``run-batch``, ``LLM`` and an embedded
``AsyncLLM`` end here: from their HTTP models if they have one, else when the engine admits them.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from vllm_steer.errors import RequestError, UnsupportedError
from vllm_steer.request.schema import REQUEST_KEY, SteeringRequest, first_steering_key
from vllm_steer.serving.admission import Admission, AdmittedPlan, Wanted
from vllm_steer.serving.http_context import HttpContext, current_http_context
from vllm_steer.serving.receipt import Receipt
from vllm_steer.serving.refusals import refusal

if TYPE_CHECKING:
    from vllm.sampling_params import SamplingParams

# Of one response.
MAX_PROMPT_SCORES = 2**20
# Of all prompts of one body, without the first of each.
MAX_BODY_RANGES = 2**11
# Set while vLLM's beam search generates, step by step, for a request without steering.
beam_search: ContextVar[bool] = ContextVar("beam_search", default=False)


def wanted_of(
    admission: Admission, extra_args: dict[str, Any], *, generates: bool = True
) -> Wanted | None:
    """Returns the steering of a request: its alias, its own, or the default, and at least the operator's
    reads.

    Args:
        admission: Admission of its engine.
        extra_args: Its extra arguments.
        generates: Whether it generates; the default applies only then.

    Raises:
        VLLMValidationError: It has steering besides its alias, malformed steering, or does not generate.
    """
    http_context = current_http_context.get()
    if http_context is None or http_context.alias is None:
        asked = _asked(admission, extra_args, http_context)
        if asked is not None:
            return Wanted(asked)
        if not generates or beam_search.get():
            return None
        default = admission.default(extra_args) or admission.watch()
        return None if default is None else Wanted(default, is_default=True)
    given = {key: value for key, value in extra_args.items() if value is not None}
    if (key := first_steering_key(given)) is not None:
        raise refusal(
            RequestError(
                f"model {http_context.model!r} is an alias that steers; remove {key!r} or use the model itself"
            )
        )
    if not generates:
        raise refusal(
            UnsupportedError(
                f"model {http_context.model!r} is an alias that steers, but this route does not generate text; "
                "use the model itself"
            )
        )
    return Wanted(http_context.alias)


def _asked(
    admission: Admission, extra_args: dict[str, Any], http_context: HttpContext | None
) -> SteeringRequest | None:
    """The steering in a request, parsed once for all prompts of its body, whose values are the same
    objects."""
    known = http_context.asked if http_context is not None else None
    if known is not None:
        before, asked = known
        if before is extra_args or (
            before.keys() == extra_args.keys()
            and all(before[key] is value for key, value in extra_args.items())
        ):
            return asked
    asked = admission.parse(extra_args)
    if http_context is not None:
        http_context.asked = (extra_args, asked)
    return asked


def admitted(
    admission: Admission, wanted: Wanted, prompt_len: int, sampling_params: SamplingParams
) -> AdmittedPlan:
    """Returns the plan of a prompt, and adds its receipt to the HTTP context if there is one.

    Args:
        admission: Admission of its engine.
        wanted: The steering.
        prompt_len: Tokens of the prompt.
        sampling_params: Its ``SamplingParams``.

    Raises:
        VLLMValidationError: It cannot be carried out.
    """
    plan = admission.admit(wanted, prompt_len, sampling_params)
    http_context = current_http_context.get()
    if http_context is not None and not http_context.ended:
        _count_ranges(http_context, plan.receipt)
        _count_prompt_scores(http_context, plan.receipt)
        http_context.receipts.append(plan.receipt)
        admission.pin(plan.receipt)
    return plan


def _count_ranges(http_context: HttpContext, receipt: Receipt) -> None:
    """Counts the ranges that are planned before the server can answer anybody else.

    Raises:
        VLLMValidationError: They are too many.
    """
    http_context.ranges += max(0, len(receipt.plan.segments) - 1)
    if http_context.ranges > MAX_BODY_RANGES:
        raise refusal(
            RequestError(
                f"{REQUEST_KEY}: the prompts of one body may have {MAX_BODY_RANGES} ranges of positions in total, besides "
                f"one each; send fewer prompts, or give fewer ranges"
            )
        )


def _count_prompt_scores(http_context: HttpContext, receipt: Receipt) -> None:
    """Counts what a response must hold before anything is generated, which costs a client next to nothing.

    Raises:
        VLLMValidationError: It is too much.
    """
    own = receipt.plan.reads[: receipt.own_reads]
    tokens = sum(read.prompt_tokens(receipt.prompt_len) for read in own)
    http_context.prompt_scores += tokens * receipt.num_choices
    if http_context.prompt_scores > MAX_PROMPT_SCORES:
        raise refusal(
            RequestError(
                f"{REQUEST_KEY}.read: the answers would have more than {MAX_PROMPT_SCORES} scores of tokens of the prompts, "
                f"one for each token, read and answer; read fewer, or 'generated' positions alone, or send fewer prompts"
            )
        )
