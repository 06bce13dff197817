"""A request's plan is checked where the engine takes the request in.

The worker plans a whole step at once, so a plan that cannot be carried out must never reach it:
there it would take down the batch. Here vLLM answers the one request with an error and serves on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm_steer.config import ResolvedConfig, resolved_config
from vllm_steer.errors import RequestError
from vllm_steer.limits import check_limits
from vllm_steer.request import PLAN_KEY
from vllm_steer.steering_plan import SteeringPlan
from vllm_steer.store import PackStore, configured_store

_CONFIG = "_vllm_steer_config"


def check_intake(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps ``EngineCore.preprocess_add_request``, whose errors fail the one request."""

    def preprocess_add_request(self: Any, request: Any) -> Any:
        params = request.sampling_params
        payload = (params.extra_args or {}).get(PLAN_KEY) if params is not None else None
        if payload is not None:
            config = core_config(self)
            if config is None:
                raise RequestError("a steered request reached an engine without steering")
            check_plan(payload, config, configured_store(config))
        return original(self, request)

    return preprocess_add_request


def core_config(engine: Any) -> ResolvedConfig | None:
    """The steering configuration of an ``EngineCore``, read once; None when steering is off."""
    if not hasattr(engine, _CONFIG):
        setattr(engine, _CONFIG, resolved_config(engine.vllm_config.additional_config))
    config: ResolvedConfig | None = getattr(engine, _CONFIG)
    return config


def check_plan(payload: Any, config: ResolvedConfig, store: PackStore) -> None:
    """Checks that the workers can carry out a plan.

    Args:
        payload: The plan as it travels, :meth:`SteeringPlan.to_payload`.
        config: The engine's steering configuration.
        store: Its packs.

    Raises:
        RequestError: They cannot.
    """
    try:
        plan = SteeringPlan.from_payload(payload)
        keys = [segment.key for segment in plan.segments]
        stated = [key for _, _, key, *_ in payload]
    except (TypeError, ValueError, AttributeError) as error:
        raise RequestError(f"the steering plan is malformed: {error}") from error
    if keys != stated:
        raise RequestError("the steering plan's keys do not belong to its content")
    position = 0
    for number, segment in enumerate(plan.segments):
        last = number == len(plan.segments) - 1
        if segment.start < position or (segment.end is None and not last):
            raise RequestError("the steering plan's ranges overlap or are out of order")
        if segment.end is not None and segment.end <= segment.start:
            raise RequestError("a range of the steering plan is empty")
        position = segment.end or position
        for term in segment.terms:
            for digest in term.digests:
                known = store.by_digest(digest).record.layers
                if not set(term.layers) <= set(known):
                    raise RequestError(
                        f"the steering plan names layers {term.layers}; the direction has {known}"
                    )
    check_limits(plan, config)
