"""Strength: a scale as a multiple of a direction's calibrated scale.

It is only defined for the calibrated form and layers: the direction's default form on its default layers.
Importing this module imports neither torch nor vllm.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from vllm_steer.errors import RequestError
from vllm_steer.fields import show_layers
from vllm_steer.operations import FormChoice
from vllm_steer.packs.registry import LoadedDirection, PackRegistry
from vllm_steer.plan.binding import BoundRequest
from vllm_steer.plan.steering_plan import Form, SteeringPlan, Term
from vllm_steer.request.schema import DirectionChoice


def check_calibrated(choice: DirectionChoice, direction: LoadedDirection) -> None:
    """Checks that a choice may give a strength.

    Raises:
        RequestError: The direction is not calibrated; the message starts with the field.
    """
    if choice.strength is not None and direction.record.calibration is None:
        raise RequestError(
            f"strength: direction {direction.full_name!r} is not calibrated; give scale, or calibrate the pack with "
            f"`vllm-steer calibrate`"
        )


def scale_of(
    strength: float,
    direction: LoadedDirection,
    form: Form,
    layers: Sequence[int],
    registry: PackRegistry,
) -> float:
    """Returns the scale of a calibrated direction at a strength.

    Args:
        strength: Multiple of the default scale.
        direction: The direction.
        form: How it acts.
        layers: Layers that it steers, ascending.
        registry: The loaded packs.

    Raises:
        RequestError: It was calibrated in another form or on other layers; the message starts with the field.
    """
    record = direction.record
    if not _is_as_measured(direction, form, layers, registry):
        raise RequestError(
            f"strength: the strength of {direction.full_name!r} was calibrated on layers "
            f"{show_layers(record.steered_layers)}, for its own op {record.op!r}; give scale"
        )
    return strength * record.default_scale


def strengths_of(bound: BoundRequest, plan: SteeringPlan) -> dict[Term, float]:
    """Returns the strengths of those terms of a plan that a request could give by strength.

    Args:
        bound: The request that the plan was made from.
        plan: The plan that is carried out.
    """
    # Two packs may hold the same content; use the one in the request.
    asked = {choice.direction.digest: choice.direction for choice in bound.choices}
    strengths = {}
    for term in plan.terms:
        direction = asked[term.digest]
        scale = direction.record.default_scale
        if (
            direction.record.calibration is not None
            and scale != 0
            and _is_as_measured(direction, term.form, term.layers, bound.registry)
        ):
            strengths[term] = term.scale / scale
    return strengths


def _is_as_measured(
    direction: LoadedDirection, form: Form, layers: Sequence[int], registry: PackRegistry
) -> bool:
    """Whether a form and layers are the calibrated ones; gates choose tokens, as positions do."""
    record = direction.record
    own = record.form or FormChoice()
    name = own.plane or own.read
    partner = registry.find_beside(direction, name).digest if name else None
    measured = Form(
        record.op,
        partner,
        own.bias or 0.0,
        threshold=own.threshold or 0.0,
        restore_norm=bool(own.restore_norm),
        activation=(own.activation or "set") if record.op == "feature" else None,
    )
    given = replace(form, gate=None, threshold=0.0 if form.gate else form.threshold, slope=0.0)
    return given == measured and list(layers) == record.steered_layers
