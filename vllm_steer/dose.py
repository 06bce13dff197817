"""How strong a change is: its length over that of the residual stream.

Bounds from the norms that the packs have measured. Importing this module imports neither torch
nor vllm.
"""

from __future__ import annotations

import math
from dataclasses import replace

from vllm_steer.errors import DoseError
from vllm_steer.forms import LINEAR_OPS, MAX_ANGLE, PLANE_OPS
from vllm_steer.registry import LoadedDirection, PackRegistry
from vllm_steer.steering_plan import SteeringPlan, Term

# A vector this many times longer than the residual stream leaves only noise and, in half
# precision, overflows.
MAX_RELATIVE_SCALE = 1000.0


def relative_dose(plan: SteeringPlan, registry: PackRegistry) -> float:
    """Returns how strong a plan is at most: Σ‖change‖ over the norm of the residual stream.

    For additions that is Σ|ε|·‖v‖/‖h‖, at the largest factor of a schedule; for the other forms the
    most that the change can be for a residual stream of the measured norm.

    Args:
        plan: The plan.
        registry: The loaded packs, with the norms that they measured.

    Returns:
        The largest value over layers and positions; 0 for a plan that changes nothing.
    """
    doses = [0.0]
    for segment in plan.segments:
        by_layer: dict[int, float] = {}
        for term in segment.terms:
            direction = registry.by_digest(term.digest)
            for layer in term.layers:
                by_layer[layer] = by_layer.get(layer, 0.0) + _dose(term, direction, registry, layer)
        doses.append(max(by_layer.values()))
    return max(doses)


def scaled(plan: SteeringPlan, factor: float) -> SteeringPlan | None:
    """Returns the plan with every scale multiplied by ``factor``.

    None where a form's change is not proportional to its scale, so that this would not weaken it.
    """
    if any(t.form.op not in LINEAR_OPS for segment in plan.segments for t in segment.terms):
        return None
    return SteeringPlan(
        tuple(
            replace(
                segment,
                terms=tuple(replace(term, scale=term.scale * factor) for term in segment.terms),
            )
            for segment in plan.segments
        )
    )


def check_scale(where: str, term: Term, direction: LoadedDirection, registry: PackRegistry) -> None:
    """Checks that a term's scale leaves a residual stream that the model can use.

    Args:
        where: The direction's place in the request, for the message.
        term: The term.
        direction: Its direction.
        registry: The loaded packs.

    Raises:
        DoseError: It does not; the message says what would be right.
    """
    if term.form.op in PLANE_OPS:
        if abs(term.scale) > MAX_ANGLE:
            raise DoseError(
                f"{where}.scale: {term.scale:g} is an angle in degrees and must be within {-MAX_ANGLE:g} and {MAX_ANGLE:g}"
            )
        return
    doses = direction.unit_doses
    if term.form.op != "add":
        doses = {layer: _unit_dose(term, direction, registry, layer) for layer in term.layers}
    layer = max(term.layers, key=doses.__getitem__)
    limit = MAX_RELATIVE_SCALE / doses[layer]
    if abs(term.scale) * term.peak > limit:
        limit /= term.peak
        safe = f", and up to {direction.record.safe_scale:g} the text was found fluent"
        raise DoseError(
            f"{where}.scale: {term.scale:g} would add a vector more than {MAX_RELATIVE_SCALE:g} times as long as the "
            f"residual stream at layer {layer}; |scale| must be at most {_floor(limit):g}"
            + (" with this schedule" if term.schedule else "")
            + (safe if term.form.op == "add" else "")
        )


def _dose(term: Term, direction: LoadedDirection, registry: PackRegistry, layer: int) -> float:
    """The most that a term can change the residual stream, over its norm."""
    if term.form.op == "rotate":
        return 2.0 * abs(math.sin(math.radians(term.scale) / 2.0))
    if term.form.op == "angle":
        return 2.0
    own = abs(term.scale) * term.peak * _unit_dose(term, direction, registry, layer)
    # What a clamp takes away is as long as the stream at most.
    return own + 1.0 if term.form.op == "clamp" else own


def _unit_dose(term: Term, direction: LoadedDirection, registry: PackRegistry, layer: int) -> float:
    """Relative dose of ε = 1, without what a clamp takes away."""
    unit = direction.unit_doses[layer]
    if term.form.op == "ablate":
        return 1.0
    if term.form.op == "clamp":
        return 1.0 / direction.norms[layer]
    if term.form.op == "affine" and term.form.partner is not None:
        read = registry.by_digest(term.form.partner).lengths[layer]
        return direction.lengths[layer] * (read + abs(term.form.bias) / direction.norms[layer])
    return unit


def _floor(value: float, digits: int = 4) -> float:
    """Rounds down to ``digits`` significant digits, so that the limit shown is within the limit."""
    unit = 10.0 ** (math.floor(math.log10(value)) - digits + 1)
    return math.floor(value / unit) * unit
