"""Chat requests without HTTP, from ``vllm run-batch``, with aliases and receipts as over HTTP.

Nobody retries a line of a file, so these requests wait for rows without a time limit.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, TypeVar

from vllm_steer.request.schema import REQUEST_KEY
from vllm_steer.serving.admission import current_admission
from vllm_steer.serving.aliases import named_alias
from vllm_steer.serving.http_context import HttpContext, current_http_context

if TYPE_CHECKING:
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat

R = TypeVar("R")
_ROUTE = "/v1/chat/completions"


def follow_chat(original: Callable[..., Awaitable[R]]) -> Callable[..., Awaitable[R]]:
    """Wraps ``OpenAIServingChat.create_chat_completion``; HTTP requests pass unchanged."""

    async def create_chat_completion(
        self: OpenAIServingChat, request: ChatCompletionRequest, *args: object, **kwargs: object
    ) -> R:
        admission = current_admission()
        routed = current_http_context.get() is not None
        if admission is None or admission.config is None or routed or request.stream:
            return await original(self, request, *args, **kwargs)
        http_context = HttpContext(_ROUTE, patient=True)
        model = request.model or ""
        named = named_alias(admission.policy, model)
        if named is not None and not self.models.is_base_model(model):
            http_context.model, http_context.alias = model, named.steering
            request = request.model_copy(update={"model": named.served})
        with admission.answering(http_context):
            answer = await original(self, request, *args, **kwargs)
        shown = http_context.shown_receipts
        if shown and hasattr(answer, "choices"):
            # vLLM's responses keep unknown fields.
            setattr(answer, REQUEST_KEY, [receipt.to_json() for receipt in shown])
        return answer

    return create_chat_completion
