"""Checks a request's plan when the engine admits the request.

The worker plans a whole step at once, so a plan that cannot be carried out must never reach it: it would fail
the whole batch. Here vLLM fails only the one request.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from vllm_steer.config import ResolvedConfig, resolved_config
from vllm_steer.engine.content_pins import PINS
from vllm_steer.engine.token_rows import NO_END
from vllm_steer.errors import ConfigError, RequestError
from vllm_steer.packs.store import PackStore, configured_store
from vllm_steer.plan.bounds import check_distance
from vllm_steer.plan.capacity import check_capacity
from vllm_steer.plan.message import plan_of
from vllm_steer.plan.reads import Read, check_reads
from vllm_steer.plan.steering_plan import MAX_SEGMENTS, SteeringPlan, Term
from vllm_steer.request.positions import MAX_TOKEN_IDS
from vllm_steer.request.stop_tokens import MAX_TRIGGERS, StopTokens
from vllm_steer.request.token_matches import MAX_MATCHES
from vllm_steer.vllm_compat.attached import Attached
from vllm_steer.vllm_compat.model_shape import dtype_name

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.engine import EngineCoreRequest
    from vllm.v1.engine.core import EngineCore

R = TypeVar("R")
_CONFIG = Attached[ResolvedConfig | None]("config")
_STORE = Attached[PackStore]("store")


def read_packs(original: Callable[..., R]) -> Callable[..., R]:
    """Wraps ``EngineCore._initialize_kv_caches`` to read the packs at startup.

    The core may be a separate process, and a pack on disk may have changed when the first request arrives.
    """

    def _initialize_kv_caches(self: EngineCore, vllm_config: VllmConfig) -> R:
        if resolved_config(vllm_config.additional_config) is not None:
            core_store(self)
        return original(self, vllm_config)

    return _initialize_kv_caches


def check_intake(original: Callable[..., R]) -> Callable[..., R]:
    """Wraps ``EngineCore.preprocess_add_request``, whose errors fail the one request."""

    def preprocess_add_request(self: EngineCore, request: EngineCoreRequest) -> R:
        plan = plan_of(request.sampling_params)
        if plan is None:
            return original(self, request)
        config = core_config(self)
        if config is None:
            raise RequestError("a steered request reached an engine without steering")
        # Pinned before it is looked up, so that it cannot be dropped in between.
        PINS.pin(request.request_id, plan.digests)
        try:
            dtype = dtype_name(self.vllm_config.model_config.dtype)
            check_plan(plan, config, core_store(self), dtype)
            return original(self, request)
        except BaseException:
            PINS.unpin(request.request_id)
            raise

    return preprocess_add_request


def core_config(engine: EngineCore) -> ResolvedConfig | None:
    """Returns the steering configuration of an engine core, read once; None if steering is off."""
    return _CONFIG.get_or_make(
        engine, lambda: resolved_config(engine.vllm_config.additional_config)
    )


def core_store(engine: EngineCore) -> PackStore:
    """Returns the packs of an engine core with steering, kept as long as it runs.

    Raises:
        ConfigError: It was started without steering.
        PackError: The packs on disk are not the configured ones.
    """
    config = core_config(engine)
    if config is None:
        raise ConfigError("this engine was started without steering")
    return _STORE.get_or_make(engine, lambda: configured_store(config))


def check_plan(plan: SteeringPlan, config: ResolvedConfig, store: PackStore, dtype: str) -> None:
    """Checks that the workers can carry out a plan.

    Args:
        plan: The received plan.
        config: The engine's steering configuration.
        store: Its packs.
        dtype: Name of the model's dtype.

    Raises:
        RequestError: They cannot.
    """
    if len({segment.stop for segment in plan.segments}) > 1:
        raise RequestError("the steering plan's segments have different triggers")
    _check_stop(plan.stop)
    _check_matches(plan)
    if len(plan.segments) > MAX_SEGMENTS or len(plan.entries) > MAX_SEGMENTS:
        raise RequestError(f"the steering plan has more than {MAX_SEGMENTS} ranges")
    position = 0
    for number, segment in enumerate(plan.segments):
        last = number == len(plan.segments) - 1
        if segment.start < position or (segment.end is None and not last):
            raise RequestError("the steering plan's ranges overlap or are out of order")
        if segment.end is not None and segment.end <= segment.start:
            raise RequestError("a range of the steering plan is empty")
        position = segment.end or position
        if not 0 <= segment.start < NO_END or position > NO_END:
            raise RequestError(f"the steering plan's positions must be below {NO_END}")
        if not segment.terms:
            raise RequestError("a range of the steering plan has no terms")
        for term in segment.terms:
            _check_numbers(term)
            for digest in term.digests:
                known = store.by_digest(digest).record.layers
                if not set(term.layers) <= set(known):
                    raise RequestError(
                        f"the steering plan names layers {term.layers}; the direction has {known}"
                    )
    for read in plan.reads:
        _check_read(read, store)
    for stop in plan.rules:
        if not 0 <= stop.read < len(plan.reads) or stop.tokens < 1 or not math.isfinite(stop.above):
            raise RequestError("a rule of the steering plan that ends the answer is invalid")
    check_reads(plan.reads, config)
    check_capacity(plan, config)
    # The additive form has no second bound in the graph, so its rows must satisfy this one.
    check_distance(plan, store, dtype)


def _check_read(read: Read, store: PackStore) -> None:
    """Raises RequestError if a worker could not carry out a read."""
    known = store.by_digest(read.digest).record.layers
    if not read.layers or not set(read.layers) <= set(known):
        raise RequestError(
            f"the steering plan reads layers {read.layers}; the direction has {known}"
        )
    for start, end in read.ranges:
        if not 0 <= start < NO_END or not start < (NO_END if end is None else end) <= NO_END:
            raise RequestError("a range that the steering plan reads is empty or has no place")


def _check_numbers(term: Term) -> None:
    """Raises RequestError if a number of a term is not finite, or its schedule has no length."""
    numbers = [term.scale, term.form.bias, term.form.threshold, term.form.slope]
    schedule = term.schedule
    if schedule is not None:
        numbers += [schedule.start, schedule.end]
        if not (0 <= schedule.origin < NO_END and 1 <= schedule.tokens < NO_END):
            raise RequestError("a schedule of the steering plan has no place or no length")
    if not all(map(math.isfinite, numbers)):
        raise RequestError("a number of the steering plan is not finite")
    if term.form.slope < 0.0:
        raise RequestError("the slope of a gate of the steering plan is negative")


def _check_matches(plan: SteeringPlan) -> None:
    """Raises RequestError if a worker could not find the tokens that a plan's directions act on."""
    if len(plan.matches) > MAX_MATCHES:
        raise RequestError(f"the steering plan has more than {MAX_MATCHES} choices of tokens")
    for match in plan.matches:
        numbers = (match.origin, *match.tokens)
        fit = all(0 <= number < NO_END for number in numbers)
        if not fit or not 1 <= len(match.tokens) <= MAX_TOKEN_IDS:
            raise RequestError(
                f"the steering plan's choices of tokens must be 1 to {MAX_TOKEN_IDS} token ids and a position"
            )


def _check_stop(stop: StopTokens | None) -> None:
    """Raises RequestError if a worker could not handle the triggers."""
    if stop is None:
        return
    numbers = (stop.origin, *stop.tokens)
    fit = all(isinstance(number, int) and 0 <= number < 2**31 for number in numbers)
    if not fit or not 1 <= len(stop.tokens) <= MAX_TRIGGERS:
        raise RequestError(
            f"the steering plan's triggers must be 1 to {MAX_TRIGGERS} token ids and a position"
        )
