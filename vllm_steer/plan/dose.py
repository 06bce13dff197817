"""How strong a change is, in a measure that tells when the text breaks: the dose.

The raw dose of a direction is the length of its change over that of the residual stream, added up
over its layers: what one layer adds is still there when the next one adds. Directions that are
added (``add``), that feed back (``affine``) and that turn (``rotate``) add up so. What sets a component
does in part: what one layer has taken away is not there to be taken away again, so that is counted
once, at the layer where it is most; what it puts in its place adds up like an addition.

- ``ablate``: ε up to 1 takes that share away and puts in nothing; shares of less than 1 at several
  layers take more together, at most all of it. Beyond 1, and below 0, the rest of ε puts the component
  in, the other way round or once more, at every layer.
- ``clamp``: takes away no more than the whole stream, and puts in |ε| at every layer.
- ``angle``: turns whatever is there to one place, which moves it by no more than twice its length.

The dose is the raw dose over the largest at which the direction's text was found fluent, so that 1 is
the largest fluent dose: the calibration's ``fluent_dose``, or, of a form whose change does not depend on
the vector's length, what its safe scale comes to. For a direction, or a form of it, that nobody
calibrated it is the raw dose itself: 1 is then a change whose lengths add up, over layers, to the
residual stream's own, and real models lose their text at about that. Lengths are bounds from the norms
that the packs have measured.
Importing this module imports neither torch nor vllm.
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

# A vector this many times longer than the residual stream leaves only noise and, in half
# precision, overflows.
MAX_RELATIVE_SCALE = 1000.0


def relative_dose(plan: SteeringPlan, registry: PackRegistry) -> float:
    """Returns the dose of a plan: 1 is the largest at which text was found fluent.

    That is Σ raw dose / reference over the terms that act at a position, each at the largest factor
    of its schedule. The reference is the largest raw dose that a calibration found fluent, where the
    direction acts by its own op and there is one, else 1.

    Args:
        plan: The plan.
        registry: The loaded packs, with the norms and the fluent doses that they measured.

    Returns:
        The largest value over positions; 0 for a plan that changes nothing.
    """
    doses = {t: _dose(t, registry) for t in {t for s in plan.segments for t in s.terms}}
    return max((sum(doses[t] for t in s.terms) for s in plan.segments), default=0.0)


def scaled(plan: SteeringPlan, factor: float) -> SteeringPlan | None:
    """Returns the plan with every scale multiplied by ``factor``.

    Its dose is ``factor`` times that of ``plan`` for a factor from 0 to 1, or less where an ablation
    of more than 1 becomes one that puts less in.

    None where a form's change is not proportional to its scale, so that this would not weaken it.
    """
    if any(term.form.op not in LINEAR_OPS for term in plan.terms):
        return None
    weaker = [
        replace(
            segment,
            terms=tuple(replace(term, scale=term.scale * factor) for term in segment.terms),
        )
        for segment in plan.segments
    ]
    return replace(plan, segments=tuple(weaker))


def check_scale(field: str, term: Term, direction: LoadedDirection, registry: PackRegistry) -> None:
    """Checks that a term's scale leaves a residual stream that the model can use.

    Args:
        field: Where the request says the scale, for the message.
        term: The term.
        direction: Its direction.
        registry: The loaded packs.

    Raises:
        DoseError: It does not; the message says what would be right.
    """
    if term.form.op in PLANE_OPS:
        if abs(term.scale) > MAX_ANGLE:
            raise DoseError(
                f"{field}: {term.scale:g} is an angle in degrees and must be within {-MAX_ANGLE:g} and {MAX_ANGLE:g}"
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
                f", and up to {safe:g} the text was found fluent"
                if term.form.op == direction.record.op == "add" and safe is not None
                else ""
            )
        )


def _dose(term: Term, registry: PackRegistry) -> float:
    """Dose of a term at the factor of its schedule where it is largest, which is one of its ends."""
    direction = registry.by_digest(term.digest)
    ends = (term.schedule.start, term.schedule.end) if term.schedule else (1.0,)
    raw = max(_raw_dose(term, term.scale * end, direction, registry) for end in ends)
    return raw / (_fluent_dose(term, direction, registry) or 1.0)


def _fluent_dose(term: Term, direction: LoadedDirection, registry: PackRegistry) -> float | None:
    """Largest raw dose at which text was found fluent; None where none was."""
    record = direction.record
    # What was measured of one op says nothing of another.
    if record.calibration is None or term.form.op != record.op:
        return None
    if record.calibration.fluent_dose is not None or record.op in ("add", "affine"):
        return record.calibration.fluent_dose
    if record.safe_scale is None:
        return None
    # No turn moves more than half a one.
    safe = min(record.safe_scale, 180.0) if record.op == "rotate" else record.safe_scale
    measured = replace(term, layers=tuple(record.steered_layers))
    return _raw_dose(measured, safe, direction, registry)


def _raw_dose(
    term: Term, scale: float, direction: LoadedDirection, registry: PackRegistry
) -> float:
    """The most that a term changes the residual stream at a scale, over its length."""
    op = term.form.op
    if op == "angle":
        return 2.0
    if op == "rotate":
        return len(term.layers) * 2.0 * abs(math.sin(math.radians(scale) / 2.0))
    taken = 1.0 if op == "clamp" else 0.0
    if op == "ablate":
        taken = min(max(scale, 0.0), 1.0)
        scale -= taken
    return taken + raw_dose(scale, _unit_lengths(term, direction, registry), direction.norms)


def _unit_lengths(
    term: Term, direction: LoadedDirection, registry: PackRegistry
) -> dict[int, float]:
    """The most that ε = 1 puts into a residual stream of the measured norm, by layer."""
    form, norms = term.form, direction.norms
    if form.op == "ablate":
        return {layer: norms[layer] for layer in term.layers}
    if form.op == "clamp":
        return dict.fromkeys(term.layers, 1.0)
    lengths = {layer: direction.lengths[layer] for layer in term.layers}
    if form.op == "affine" and form.partner is not None:
        read = registry.by_digest(form.partner).lengths
        return {
            layer: length * (read[layer] * norms[layer] + abs(form.bias))
            for layer, length in lengths.items()
        }
    return lengths


def _floor(value: float, digits: int = 4) -> float:
    """Rounds down to ``digits`` significant digits, so that the limit shown is within the limit."""
    unit = 10.0 ** (math.floor(math.log10(value)) - digits + 1)
    return math.floor(value / unit) * unit
