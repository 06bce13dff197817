"""Checks a plan against the engine's capacity: rows of the bank, operations, components of each row.

Importing this module imports neither torch nor vllm.
"""

from __future__ import annotations

from collections.abc import Sequence

from vllm_steer.config import ResolvedConfig
from vllm_steer.errors import RequestError
from vllm_steer.plan.row_layout import layout_of
from vllm_steer.plan.steering_plan import ADDITION, SteeringPlan, Term
from vllm_steer.request.schema import REQUEST_KEY

# A plane takes two adjacent components.
PLANE_RANK = 2


def check_capacity(plan: SteeringPlan, config: ResolvedConfig) -> None:
    """Checks that an engine can carry out a plan.

    Args:
        plan: The plan.
        config: The engine's steering configuration.

    Raises:
        RequestError: It cannot; the message says how to start the server.
    """
    # Ranges with the same terms share rows.
    different = list({id(segment.terms): segment for segment in plan.segments}.values())
    count = len(plan.sums)
    if count > config.sums_per_request:
        raise RequestError(
            f"{REQUEST_KEY}.directions: they need {count} rows, and a request may use {config.sums_per_request}; give fewer "
            f"ranges of positions or choices of token ids, or raise --steering-rows"
        )
    for segment in different:
        if segment.schedules != (None,) and config.ops == "additive":
            raise RequestError(
                f"{REQUEST_KEY}.schedule: schedules need a server started with --steering-ops affine"
            )
        if len(segment.schedules) > 1:
            rank = layout_of(segment, config.rank).rank
            if rank > config.rank:
                raise RequestError(
                    f"{REQUEST_KEY}.directions: with different schedules, those at one position have a total "
                    f"rank of {rank}, and the limit is {config.rank}; give them the same schedule, name fewer, or raise "
                    f"--steering-rank"
                )
        if all(term.form == ADDITION for term in segment.terms):
            continue
        for layer in sorted({layer for term in segment.terms for layer in term.layers}):
            _check_layer([term for term in segment.terms if layer in term.layers], layer, config)


def _check_layer(terms: Sequence[Term], layer: int, config: ResolvedConfig) -> None:
    """Checks the terms that act at one layer and position."""
    rank = sum(term.rank for term in terms)
    if config.ops == "additive":
        if rank or any(term.form.restore_norm for term in terms):
            raise RequestError(
                f"{REQUEST_KEY}.directions: op, gate and restore_norm need a server started with --steering-ops affine"
            )
        return
    multiplied = [term for term in terms if term.form.op == "multiply"]
    if multiplied and not config.multiply:
        raise RequestError(
            f"{REQUEST_KEY}.directions: op 'multiply' needs a server started with --steering-ops affine --steering-multiply"
        )
    if rank > config.rank:
        raise RequestError(
            f"{REQUEST_KEY}.directions: those at layer {layer} have a total rank of {rank}, and the limit is "
            f"{config.rank}; name fewer, or raise --steering-rank"
        )
    if len({term.form.restore_norm for term in terms}) > 1:
        raise RequestError(
            f"{REQUEST_KEY}.directions: set restore_norm for all directions at layer {layer}, or for none"
        )
    if len({(term.form, term.schedule) for term in multiplied}) > 1:
        raise RequestError(
            f"{REQUEST_KEY}.directions: give those with op 'multiply' at layer {layer} the same gate and the same schedule"
        )
