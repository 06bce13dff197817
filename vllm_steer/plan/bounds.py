"""How far a plan may carry the residual stream at most, and how far the model's dtype lets it go.

A number that overflows does not stay with its request: it lies in blocks of the key-value cache, and in scratch
memory of attention kernels, that others use next. So what a request asks for is bounded before it runs, and what a
block returns is kept finite in the graph (``vllm_steer.engine.finite``).

At one layer a plan makes of a stream h at most ``gain * ‖h‖ + length``. Let n be the norm of the stream that was
measured there and d the distance that earlier layers have moved it: after the layer that is at most
``gain * d + (gain - 1) * n + length``, since what a block computes of a normalised input does not grow with it.
n is a median without each prompt's first token, which may be a hundred times as long where it takes up attention: at that
token a gain above 1 goes further than this bound, and what the block returns is kept finite alone.
Importing this module imports neither torch nor vllm.
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

# A quarter of the largest float16, which leaves room for the stream itself; of the others, what a norm can square in
# float32, with as much room.
_FARTHEST = {"float16": 65504.0 / 4, "bfloat16": 1e15, "float32": 1e15}


class Contents(Protocol):
    """Where directions are found by content: a registry, or a store, which has replaced ones too."""

    def by_digest(self, digest: str) -> LoadedDirection:
        """Returns a direction."""


@dataclass(frozen=True)
class LayerBound:
    """The most that the terms at one layer do together.

    Attributes:
        gain: Factor of the stream's length, at least 1.
        length: What is added to it.
    """

    gain: float
    length: float


def farthest(dtype: str) -> float:
    """Returns the distance that a stream of a dtype may be carried.

    Args:
        dtype: Name of the model's dtype; one that is not known has the least.
    """
    return _FARTHEST.get(dtype, min(_FARTHEST.values()))


def check_distance(plan: SteeringPlan, registry: Contents, dtype: str) -> None:
    """Checks how far a plan may carry the stream at each layer and over the layers together.

    Args:
        plan: The plan.
        registry: The loaded packs' directions, with the norms that they measured.
        dtype: Name of the model's dtype.

    Raises:
        DoseError: It is too far; the message says what would be right.
    """
    for meeting in dict.fromkeys(segment.terms for segment in plan.segments):
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
                    f"{moved:.3g} times its length, at most {MAX_RELATIVE_SCALE:g} are taken; lower the scales"
                )
            distance = bound.gain * distance + (bound.gain - 1.0) * norm + bound.length
        if distance > _slightly_more(farthest(dtype)):
            raise DoseError(
                f"{REQUEST_KEY}.directions: over {len(layers)} layers they would move the residual stream by up to "
                f"{distance:.3g}, this server's {dtype} takes {farthest(dtype):.4g}; lower the scales, or name fewer "
                f"layers"
            )


def layer_bound(terms: Sequence[Term], layer: int, norm: float, registry: Contents) -> LayerBound:
    """Returns the bound of terms that act at one layer and position.

    Args:
        terms: The terms, all of which have the layer.
        layer: The layer.
        norm: Norm of the stream there.
        registry: The loaded packs' directions.
    """
    if any(term.form.restore_norm for term in terms):
        # For all of them or for none; the stream may be turned about.
        return LayerBound(1.0, 2.0 * norm)
    length, turned, rest = 0.0, [], 0.0
    # Of the symmetric part 1 - Σ ε u uᵀ, by the sign of ε: its eigenvalues lie between 1 - taken and 1 + put.
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


def _slightly_more(limit: float) -> float:
    """A limit that what was lowered to it keeps, whatever was rounded."""
    return limit * (1.0 + 1e-9)
