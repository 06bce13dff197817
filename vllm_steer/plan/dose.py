"""The dose: a measure of a change's strength that predicts when the text breaks.

The raw dose of a direction is the length of its change divided by that of the residual stream, summed over
its layers, since changes of successive layers accumulate. So do ``add``, ``affine`` (feedback), ``multiply``
(by its largest factor) and ``rotate``. Ops that set a component accumulate in part: a component removed by
one layer cannot be removed again, so the removal is counted once, at the layer where it is largest; the
component put in its place is summed like an addition.

- ``ablate``: ε up to 1 removes that share and puts in nothing; shares below 1 at several layers remove more
  together, at most all of it. Above 1, and below 0, the rest of ε puts the component in, reversed or once
  more, at every layer.
- ``clamp``: removes at most the whole stream, and puts in |ε| at every layer.
- ``feature``: takes away at most the largest activation that a stream of the measured norm can have, or adds its
  multiple, and puts in |ε| where the activation is set, at every layer.
- ``angle``: rotates the stream to a fixed angle, which moves it by at most twice its length.

The dose is the raw dose divided by the largest at which the direction's text was fluent, so 1 is the largest
fluent dose: the calibration's ``fluent_dose``, or, for a form whose change does not depend on the vector's
length, the raw dose at its safe scale. For an uncalibrated direction or form it is the raw dose itself: 1 is
then a change whose lengths sum, over layers, to that of the residual stream, at about which the text of real
models breaks. Lengths are bounds from the norms in the packs. Importing this module imports neither torch nor
vllm.
"""

from __future__ import annotations

import math
from dataclasses import replace

from vllm_steer.errors import DoseError
from vllm_steer.operations import LINEAR_OPS, MAX_ANGLE, PLANE_OPS
from vllm_steer.packs.calibration import raw_dose
from vllm_steer.packs.registry import LoadedDirection, PackRegistry
from vllm_steer.plan.steering_plan import SteeringPlan, Term

__all__ = ["MAX_RELATIVE_SCALE", "check_scale", "raw_dose", "relative_dose", "scaled"]

# A vector this many times as long as the residual stream leaves only noise and overflows in half precision.
MAX_RELATIVE_SCALE = 1000.0


def relative_dose(plan: SteeringPlan, registry: PackRegistry) -> float:
    """Returns the dose of a plan: 1 is the largest at which text was fluent.

    It is Σ raw dose / reference over the terms at a position, each at the largest factor of its schedule. The
    reference is the largest fluent raw dose of the calibration, if there is one and the direction acts by its
    default op, else 1.

    Args:
        plan: The plan.
        registry: The loaded packs, with their measured norms and fluent doses.

    Returns:
        The largest value over positions; 0 for a plan that changes nothing.
    """
    doses = {term: _dose(term, registry) for term in plan.terms}
    return max((sum(doses[term] for term in terms) for terms in plan.meetings), default=0.0)


def scaled(plan: SteeringPlan, factor: float) -> SteeringPlan | None:
    """Returns the plan with every scale multiplied by ``factor``.

    Its dose is ``factor`` times that of ``plan`` for a factor from 0 to 1, or less if an ablation above 1
    becomes one that puts less in.

    None if a form's change is not proportional to its scale, so scaling would not weaken it.
    """
    if any(term.form.op not in LINEAR_OPS for term in plan.terms):
        return None
    objects = {id(segment.terms): segment.terms for segment in plan.segments}
    weaker = {
        key: tuple(replace(term, scale=term.scale * factor) for term in terms)
        for key, terms in objects.items()
    }
    segments = (replace(segment, terms=weaker[id(segment.terms)]) for segment in plan.segments)
    return replace(plan, segments=tuple(segments))


def check_scale(field: str, term: Term, direction: LoadedDirection, registry: PackRegistry) -> None:
    """Checks that a term's scale leaves a usable residual stream.

    Args:
        field: The request's field for the scale, for the message.
        term: The term.
        direction: Its direction.
        registry: The loaded packs.

    Raises:
        DoseError: It does not; the message says what would be valid.
    """
    if term.form.op in PLANE_OPS:
        if abs(term.scale) > MAX_ANGLE:
            raise DoseError(
                f"{field}: {term.scale:g} is an angle in degrees and must be between {-MAX_ANGLE:g} and {MAX_ANGLE:g}"
            )
        return
    lengths = _unit_lengths(term, direction, registry)
    doses = {layer: length / direction.norms[layer] for layer, length in lengths.items()}
    layer = max(term.layers, key=doses.__getitem__)
    limit = MAX_RELATIVE_SCALE / doses[layer]
    if abs(term.scale) * term.peak > limit:
        limit /= term.peak
        safe = direction.record.safe_scale
        raise DoseError(
            f"{field}: {term.scale:g} would add a vector more than {MAX_RELATIVE_SCALE:g} times as long as the "
            f"residual stream at layer {layer}; |scale| must be at most {_floor(limit):g}"
            + (" with this schedule" if term.schedule else "")
            + (
                f", and the text was fluent up to {safe:g}"
                if term.form.op == direction.record.op == "add" and safe is not None
                else ""
            )
        )


def _dose(term: Term, registry: PackRegistry) -> float:
    """Dose of a term at the largest factor of its schedule, which is at one of its ends."""
    direction = registry.by_digest(term.digest)
    ends = (term.schedule.start, term.schedule.end) if term.schedule else (1.0,)
    raw = max(_raw_dose(term, term.scale * end, direction, registry) for end in ends)
    return raw / (_fluent_dose(term, direction, registry) or 1.0)


def _fluent_dose(term: Term, direction: LoadedDirection, registry: PackRegistry) -> float | None:
    """Largest raw dose at which text was fluent; None if there was none."""
    record = direction.record
    # Measurements of one op do not apply to another.
    if record.calibration is None or term.form.op != record.op:
        return None
    own = (record.form and record.form.activation) or "set"
    if record.op == "feature" and term.form.activation != own:
        return None
    if record.calibration.fluent_dose is not None or record.op in ("add", "affine"):
        return record.calibration.fluent_dose
    if record.safe_scale is None:
        return None
    # No rotation moves the stream further than one by 180 degrees.
    safe = min(record.safe_scale, 180.0) if record.op == "rotate" else record.safe_scale
    measured = replace(term, layers=tuple(record.steered_layers))
    return _raw_dose(measured, safe, direction, registry)


def _raw_dose(
    term: Term, scale: float, direction: LoadedDirection, registry: PackRegistry
) -> float:
    """Upper bound of a term's change at a scale, relative to the stream's length."""
    op = term.form.op
    if op == "angle":
        return 2.0
    if op == "rotate":
        return len(term.layers) * 2.0 * abs(math.sin(math.radians(scale) / 2.0))
    if op == "feature":
        at = replace(term, scale=scale)
        lengths = {layer: direction.lengths[layer] for layer in term.layers}
        replaced = raw_dose(at.gain, _most_active(at, direction, registry), direction.norms)
        return replaced + raw_dose(at.added, lengths, direction.norms)
    taken = 1.0 if op == "clamp" else 0.0
    if op == "ablate":
        taken = min(max(scale, 0.0), 1.0)
        scale -= taken
    return taken + raw_dose(scale, _unit_lengths(term, direction, registry), direction.norms)


def _unit_lengths(
    term: Term, direction: LoadedDirection, registry: PackRegistry
) -> dict[int, float]:
    """Upper bound of the length that ε = 1 puts into a stream of the measured norm, by layer."""
    form, norms = term.form, direction.norms
    if form.op == "ablate":
        return {layer: norms[layer] for layer in term.layers}
    if form.op == "clamp":
        return dict.fromkeys(term.layers, 1.0)
    if form.op == "multiply":
        return {layer: direction.largest(layer) * norms[layer] for layer in term.layers}
    if form.op == "feature" and form.activation == "multiply":
        return _most_active(term, direction, registry)
    lengths = {layer: direction.lengths[layer] for layer in term.layers}
    if form.op == "affine" and form.partner is not None:
        read = registry.by_digest(form.partner).lengths
        return {
            layer: length * (read[layer] * norms[layer] + abs(form.bias))
            for layer, length in lengths.items()
        }
    return lengths


def _most_active(
    term: Term, direction: LoadedDirection, registry: PackRegistry
) -> dict[int, float]:
    """Upper bound of the length of a feature's part in a stream of the measured norm, by layer."""
    assert term.form.partner is not None
    read = registry.by_digest(term.form.partner).lengths
    return {
        layer: direction.lengths[layer]
        * (read[layer] * direction.norms[layer] + max(term.form.bias, 0.0))
        for layer in term.layers
    }


def _floor(value: float, digits: int = 4) -> float:
    """Rounds down to ``digits`` significant digits, so that the limit shown is within the limit."""
    unit = 10.0 ** (math.floor(math.log10(value)) - digits + 1)
    return math.floor(value / unit) * unit
