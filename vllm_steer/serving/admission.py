"""Request -> checked steering, or HTTP 400.

Two steps. When an OpenAI-style request becomes sampling parameters, its steering is validated, so
that a mistake is answered before a response starts, streaming or not. When the engine's input is
made and the prompt's length is known, the steering becomes a plan of absolute positions; that is
also the check for requests that come from ``LLM`` or any other way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm.exceptions import VLLMValidationError

from vllm_steer.config import resolved_config
from vllm_steer.errors import RequestError
from vllm_steer.registry import PackRegistry
from vllm_steer.request import (
    FLAT_KEYS,
    PLAN_KEY,
    REQUEST_KEY,
    SteeringRequest,
    looks_like_steering,
    parse,
)
from vllm_steer.resolve import resolve


class Admission:
    """Checks the steering of the requests of one engine."""

    def __init__(self, additional_config: Any) -> None:
        """Loads the packs that the engine was started with.

        Args:
            additional_config: ``VllmConfig.additional_config``.
        """
        config = resolved_config(additional_config)
        self._registry = PackRegistry.load(config.packs) if config else None

    def check(self, extra_args: dict[str, Any] | None) -> SteeringRequest | None:
        """Validates the steering in a request's extra arguments.

        Returns:
            The request, or None when it asks for none.

        Raises:
            VLLMValidationError: It cannot be carried out; becomes HTTP 400.
        """
        try:
            request = parse(extra_args)
            if request is not None:
                # Any prompt length serves here: what exists does not depend on it.
                resolve(request, self._loaded(), prompt_len=1)
        except RequestError as error:
            raise VLLMValidationError(str(error), parameter=REQUEST_KEY) from error
        return request

    def plan(
        self, request: SteeringRequest, extra_args: dict[str, Any], prompt_len: int
    ) -> dict[str, Any]:
        """Returns extra arguments in which the steering is a plan of absolute positions.

        Args:
            request: What :meth:`check` made of them.
            extra_args: ``SamplingParams.extra_args``; not modified.
            prompt_len: Tokens of the prompt.
        """
        planned = {
            key: value for key, value in extra_args.items() if key not in (REQUEST_KEY, *FLAT_KEYS)
        }
        payload = resolve(request, self._loaded(), prompt_len).to_payload()
        return {**planned, PLAN_KEY: payload} if payload else planned

    def _loaded(self) -> PackRegistry:
        if self._registry is None:
            raise RequestError(
                "this engine was started without steering; start it with --enable-steering --steering-packs DIR"
            )
        return self._registry


_current: Admission | None = None


def remember_engine(original: Callable[..., None]) -> Callable[..., None]:
    """Wraps ``InputProcessor.__init__`` to give each engine's front end its admission."""

    def __init__(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        global _current
        original(self, vllm_config, *args, **kwargs)
        self._vllm_steer_admission = Admission(vllm_config.additional_config)
        # A server process has one engine; its HTTP models know of no engine and ask here.
        _current = self._vllm_steer_admission

    return __init__


def plan_inputs(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps ``InputProcessor.process_inputs`` to put the plan into the engine's request."""

    def process_inputs(
        self: Any, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any
    ) -> Any:
        admission: Admission = self._vllm_steer_admission
        wanted = admission.check(getattr(params, "extra_args", None))
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
        if _current is not None and _current.check(extra_args) is not None:
            params.extra_args = extra_args
        return params

    return to_sampling_params


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
