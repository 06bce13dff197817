"""Request -> checked steering, or HTTP 400.

Two steps. When an OpenAI-style request becomes sampling parameters, its steering is validated, so
that a mistake is answered before a response starts, streaming or not. When the engine's input is
made and the prompt's length is known, the steering becomes a plan of absolute positions; that is
also the check for requests that come from ``LLM`` or any other way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from vllm.exceptions import VLLMValidationError

from vllm_steer.config import resolved_config
from vllm_steer.errors import RequestError
from vllm_steer.registry import configured_registry
from vllm_steer.request import (
    FLAT_KEYS,
    PLAN_KEY,
    REQUEST_KEY,
    SteeringRequest,
    looks_like_steering,
    parse,
)
from vllm_steer.resolve import check_sums, resolve

# Set by vLLM's serving code just before it makes a request's sampling parameters.
_prompt_len: ContextVar[int | None] = ContextVar("_prompt_len", default=None)


class Admission:
    """Checks the steering of the requests of one engine."""

    def __init__(self, vllm_config: Any) -> None:
        """Loads the packs that the engine was started with.

        Args:
            vllm_config: The engine's ``VllmConfig``.
        """
        self._config = resolved_config(vllm_config.additional_config)
        self._registry = configured_registry(self._config) if self._config else None
        self._max_len = vllm_config.model_config.max_model_len

    def parse(self, extra_args: dict[str, Any] | None) -> SteeringRequest | None:
        """Reads the steering in a request's extra arguments.

        Returns:
            The request, or None when it asks for none.

        Raises:
            VLLMValidationError: It is malformed; becomes HTTP 400.
        """
        with _as_http_400():
            return parse(extra_args)

    def plan(
        self, request: SteeringRequest, extra_args: dict[str, Any], prompt_len: int
    ) -> dict[str, Any]:
        """Returns extra arguments in which the steering is a plan of absolute positions.

        Args:
            request: What :meth:`parse` made of them.
            extra_args: ``SamplingParams.extra_args``; not modified.
            prompt_len: Tokens of the prompt.

        Raises:
            VLLMValidationError: It cannot be carried out; becomes HTTP 400.
        """
        with _as_http_400():
            if self._config is None or self._registry is None:
                raise RequestError(
                    "this engine was started without steering; start it with --enable-steering --steering-packs DIR"
                )
            plan = resolve(request, self._registry, prompt_len, self._max_len)
            check_sums(plan, self._config.sums_per_request)
        planned = {
            key: value for key, value in extra_args.items() if key not in (REQUEST_KEY, *FLAT_KEYS)
        }
        payload = plan.to_payload()
        return {**planned, PLAN_KEY: payload} if payload else planned


@contextmanager
def _as_http_400() -> Iterator[None]:
    try:
        yield
    except RequestError as error:
        raise VLLMValidationError(str(error), parameter=REQUEST_KEY) from error


_current: Admission | None = None


def remember_engine(original: Callable[..., None]) -> Callable[..., None]:
    """Wraps ``InputProcessor.__init__`` to give each engine's front end its admission."""

    def __init__(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        global _current
        original(self, vllm_config, *args, **kwargs)
        self._vllm_steer_admission = Admission(vllm_config)
        # A server process has one engine; its HTTP models know of no engine and ask here.
        _current = self._vllm_steer_admission

    return __init__


def plan_inputs(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps ``InputProcessor.process_inputs`` to put the plan into the engine's request."""

    def process_inputs(
        self: Any, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any
    ) -> Any:
        admission: Admission = self._vllm_steer_admission
        wanted = admission.parse(getattr(params, "extra_args", None))
        if wanted is not None and kwargs.get("resumable"):
            raise VLLMValidationError(
                "steering does not support resumable sessions, whose outputs become prompt; send the whole prompt",
                parameter=REQUEST_KEY,
            )
        request = original(self, request_id, prompt, params, *args, **kwargs)
        sampling_params = request.sampling_params
        if wanted is not None:
            embeds = request.prompt_embeds
            prompt_len = len(request.prompt_token_ids) if embeds is None else embeds.shape[0]
            # A new dict: vLLM's copies of the parameters share the caller's.
            sampling_params.extra_args = admission.plan(
                wanted, sampling_params.extra_args, prompt_len
            )
        return request

    return process_inputs


def check_sampling(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps ``to_sampling_params`` of an OpenAI-style request model."""

    def to_sampling_params(self: Any, *args: Any, **kwargs: Any) -> Any:
        params = original(self, *args, **kwargs)
        extra_args = dict(params.extra_args or {})
        extra_args = _with_top_level(extra_args, self)
        request = _current.parse(extra_args) if _current is not None else None
        if _current is not None and request is not None:
            prompt_len = _prompt_len.get()
            if prompt_len is None:
                # Routes that only render a prompt for another server.
                raise VLLMValidationError(
                    "this route does not generate and cannot be steered; send the steering to the route that does",
                    parameter=REQUEST_KEY,
                )
            # For its errors: the plan that counts is made again with the engine's input.
            _current.plan(request, extra_args, prompt_len)
            params.extra_args = extra_args
        return params

    return to_sampling_params


def remember_prompt_len(original: Callable[..., int]) -> Callable[..., int]:
    """Wraps ``_extract_prompt_len``: the request's model does not know its prompt's length."""

    def _extract_prompt_len(self: Any, prompt: Any) -> int:
        length = original(self, prompt)
        _prompt_len.set(length)
        return length

    return _extract_prompt_len


def refuse_beam_search(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps ``to_beam_search_params``: vLLM's beam search drops a request's extra arguments."""

    def to_beam_search_params(self: Any, *args: Any, **kwargs: Any) -> Any:
        if any(
            looks_like_steering(key) for key in _with_top_level(dict(self.vllm_xargs or {}), self)
        ):
            raise VLLMValidationError(
                "steering does not support beam search; leave out use_beam_search or the steering",
                parameter=REQUEST_KEY,
            )
        return original(self, *args, **kwargs)

    return to_beam_search_params


def _with_top_level(extra_args: dict[str, Any], request: Any) -> dict[str, Any]:
    """Adds the steering keys that stand beside ``model`` and ``prompt`` in the request's body."""
    for key, value in (request.model_extra or {}).items():
        if looks_like_steering(key):
            if key in extra_args:
                raise VLLMValidationError(
                    f"{key!r} stands both in the request and in vllm_xargs; send it once",
                    parameter=key,
                )
            extra_args[key] = value
    return extra_args
