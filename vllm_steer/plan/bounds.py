"""Upper bounds on how far a plan moves the residual stream, and the limit of the model's dtype.

An overflow affects other requests: it remains in blocks of the KV cache and in scratch memory of attention
kernels, which others use next. So the effect of a request is bounded before it runs, and block outputs are
kept finite in the graph (``vllm_steer.engine.finite``).

At one layer a plan changes the norm of a stream h to at most ``gain * ‖h‖ + length``. Let n be the measured
norm of the stream there and d the distance by which earlier layers have moved it: after the layer the
distance is at most ``gain * d + (gain - 1) * n + length``, since a block's output on normalised input does
not grow with d. n is a median without each prompt's first token, which may be a hundred times as long if it
is an attention sink: at that token a gain above 1 exceeds this bound, and the block output is only kept
finite. Importing this module imports neither torch nor vllm.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from vllm_steer.errors import DoseError
from vllm_steer.operations import PLANE_OPS
from vllm_steer.packs.registry import LoadedDirection
from vllm_steer.plan.dose import MAX_RELATIVE_SCALE
from vllm_steer.plan.steering_plan import SteeringPlan, Term
from vllm_steer.request.schema import REQUEST_KEY

# A quarter of the largest float16, which leaves room for the stream itself; for other dtypes, the largest
# value whose square fits float32, with the same room.
_FARTHEST = {"float16": 65504.0 / 4, "bfloat16": 1e15, "float32": 1e15}


class Contents(Protocol):
    """A source of directions by content: a registry, or a store, which also has replaced ones."""

    def by_digest(self, digest: str) -> LoadedDirection:
        """Returns a direction."""


@dataclass(frozen=True)
class LayerBound:
    """Bound on the joint effect of the terms at one layer.

    Attributes:
        gain: Factor of the stream's length, at least 1.
        length: Length added to it.
    """

    gain: float
    length: float


def farthest(dtype: str) -> float:
    """Returns the distance by which a stream of a dtype may be moved.

    Args:
        dtype: Name of the model's dtype; an unknown one has the smallest limit.
    """
    return _FARTHEST.get(dtype, min(_FARTHEST.values()))


def check_distance(plan: SteeringPlan, registry: Contents, dtype: str) -> None:
    """Checks how far a plan may move the stream at each layer and over all layers.

    Args:
        plan: The plan.
        registry: The loaded packs' directions, with their measured norms.
        dtype: Name of the model's dtype.

    Raises:
        DoseError: It is too far; the message says what would be valid.
    """
    for meeting in plan.meetings:
        layers = sorted({layer for term in meeting for layer in term.layers})
        distance, norm = 0.0, 0.0
        for layer in layers:
            terms = [term for term in meeting if layer in term.layers]
            norm = max(registry.by_digest(term.digest).norms[layer] for term in terms)
            bound = layer_bound(terms, layer, norm, registry)
            moved = ((bound.gain - 1.0) * norm + bound.length) / norm
            if moved > _slightly_more(MAX_RELATIVE_SCALE):
                raise DoseError(
                    f"{REQUEST_KEY}.directions: together they would move the residual stream at layer {layer} by up to "
                    f"{moved:.3g} times its length, and the limit is {MAX_RELATIVE_SCALE:g}; lower the scales"
                )
            distance = bound.gain * distance + (bound.gain - 1.0) * norm + bound.length
        if distance > _slightly_more(farthest(dtype)):
            raise DoseError(
                f"{REQUEST_KEY}.directions: over {len(layers)} layers they would move the residual stream by up to "
                f"{distance:.3g}, and the limit for {dtype} is {farthest(dtype):.4g}; lower the scales, or name fewer "
                f"layers"
            )


def layer_bound(terms: Sequence[Term], layer: int, norm: float, registry: Contents) -> LayerBound:
    """Returns the bound of terms that act at one layer and position.

    Args:
        terms: The terms, which all have the layer.
        layer: The layer.
        norm: Norm of the stream there.
        registry: The loaded packs' directions.
    """
    if any(term.form.restore_norm for term in terms):
        # Set for all terms or none; the stream may be reversed.
        return LayerBound(1.0, 2.0 * norm)
    length, turned, rest = 0.0, [], 0.0
    # Of the symmetric part 1 + Σ diag(ε m) - Σ ε u uᵀ, by sign: its eigenvalues lie between 1 - taken and 1 + put.
    taken = put = 0.0
    for term in terms:
        scale, form = term.scale * term.peak, term.form
        direction = registry.by_digest(term.digest)
        size = direction.lengths[layer]
        if form.op == "add":
            length += abs(scale) * size
        elif form.op == "affine" and form.partner is not None:
            length += abs(scale * form.bias) * size
            read = registry.by_digest(form.partner).lengths[layer]
            own = scale * size * read
            if form.partner != term.digest:
                rest += abs(own)
            elif own < 0:
                taken -= own
            else:
                put += own
        elif form.op == "multiply":
            low, high = _factors(term, direction.extremes[layer])
            taken, put = taken + max(0.0, -low), put + max(0.0, high)
        elif form.op == "feature" and form.partner is not None:
            # Of the activation, 0 or r·h + b, no sign is known that would let parts cancel.
            read = registry.by_digest(form.partner).lengths[layer]
            length += (abs(term.added) + abs(term.gain) * max(form.bias, 0.0)) * size
            rest += abs(term.gain) * size * read
        elif form.op in PLANE_OPS:
            angle = 180.0 if form.op == "angle" else abs(scale)
            turned.append(2.0 * abs(math.sin(math.radians(min(angle, 180.0)) / 2.0)))
        elif form.op == "clamp":
            taken, length = taken + 1.0, length + abs(scale)
        elif scale > 0:
            taken += scale
        else:
            put -= scale
    alone = len(turned) == 1 and taken == put == rest == 0.0
    gain = max(1.0 + put, taken - 1.0) + rest + (0.0 if alone else sum(turned))
    return LayerBound(gain, length)


def _factors(term: Term, extremes: tuple[float, float]) -> tuple[float, float]:
    """Least and largest factor of h that a term adds to 1, at any factor of its schedule.

    Args:
        term: The term, of op ``multiply``.
        extremes: Least and largest value of its vector.
    """
    ends = (term.schedule.start, term.schedule.end) if term.schedule else (1.0,)
    found = [term.scale * end * value for end in ends for value in extremes]
    return min(found), max(found)


def _slightly_more(limit: float) -> float:
    """A limit that a value reduced to it satisfies in spite of rounding."""
    return limit * (1.0 + 1e-9)
