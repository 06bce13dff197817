"""Steering request + prompt length -> plan: which sum is added at which token positions.

The plan is what travels to the engine: disjoint ranges of absolute token positions, each with the
terms that are summed there. Its identity is the content of the vectors, never their names.
Importing this module imports neither torch nor vllm.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import zip_longest
from typing import Any

from vllm_steer.errors import DoseError, RequestError, UnknownDirectionError
from vllm_steer.positions import PositionRange, absolute_ranges
from vllm_steer.registry import LoadedDirection, PackRegistry
from vllm_steer.request import REQUEST_KEY, DirectionChoice, SteeringRequest

# A vector this many times longer than the residual stream leaves only noise and, in half
# precision, overflows.
MAX_RELATIVE_SCALE = 1000.0


@dataclass(frozen=True)
class Term:
    """One summand: scale times a direction at some of its layers.

    Attributes:
        digest: Content digest of the direction.
        scale: ε.
        layers: Layers, ascending.
    """

    digest: str
    scale: float
    layers: tuple[int, ...]


@dataclass(frozen=True)
class Segment:
    """A range of absolute token positions and the terms that are summed there.

    Attributes:
        start: First position.
        end: Position after the last one; None has no end.
        terms: The summands in canonical order, at least one.
    """

    start: int
    end: int | None
    terms: tuple[Term, ...]

    @cached_property
    def key(self) -> str:
        """Content identity of the sum: equal keys are equal vectors, bit for bit."""
        content = [[term.digest, float(term.scale).hex(), term.layers] for term in self.terms]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]


@dataclass(frozen=True)
class SteeringPlan:
    """The steering of one request by absolute position: disjoint segments, ascending."""

    segments: tuple[Segment, ...]

    def to_payload(self) -> list[Any]:
        """Returns the plan as plain lists, as it travels in ``SamplingParams.extra_args``."""
        return [
            [
                segment.start,
                segment.end,
                segment.key,
                [[t.digest, t.scale, list(t.layers)] for t in segment.terms],
            ]
            for segment in self.segments
        ]

    @classmethod
    def from_payload(cls, payload: Sequence[Any]) -> SteeringPlan:
        """Inverse of :meth:`to_payload`."""
        return cls(
            tuple(
                Segment(
                    start,
                    end,
                    tuple(Term(digest, scale, tuple(layers)) for digest, scale, layers in terms),
                )
                for start, end, _, terms in payload
            )
        )


def resolve(
    request: SteeringRequest,
    registry: PackRegistry,
    prompt_len: int,
    max_len: int | None = None,
) -> SteeringPlan:
    """Turns a request into ranges of absolute token positions.

    Args:
        request: What was asked for.
        registry: The loaded packs.
        prompt_len: Number of tokens of the prompt.
        max_len: Most tokens of prompt and answer together, None when unknown.

    Returns:
        The plan; without segments when every scale is zero.

    Raises:
        RequestError: A direction, layer or position does not exist, or a scale is out of range.
    """
    spans = []
    for index, choice in enumerate(request.directions):
        where = f"{REQUEST_KEY}.directions.{index}"
        try:
            direction = registry.find(choice.name)
        except UnknownDirectionError as error:
            raise UnknownDirectionError(f"{where}.name: {error}") from None
        term = _term(where, choice, request, direction)
        positions = choice.positions or request.positions or direction.record.positions
        try:
            ranges = absolute_ranges(positions, prompt_len, max_len)
        except RequestError as error:
            owner = where if choice.positions else REQUEST_KEY
            raise RequestError(f"{owner}.positions: {error}") from None
        if term.scale != 0.0:
            spans.append((ranges, term))
    return SteeringPlan(tuple(_segments(spans)))


def relative_dose(plan: SteeringPlan, registry: PackRegistry) -> float:
    """Returns how strong a plan is at most: Σ|ε|·‖v‖ over the norm of the residual stream.

    Args:
        plan: The plan.
        registry: The loaded packs, with the norms that they measured.

    Returns:
        The largest value over layers and positions; 0 for a plan that adds nothing.
    """
    doses = [0.0]
    for segment in plan.segments:
        by_layer: dict[int, float] = {}
        for term in segment.terms:
            unit = registry.by_digest(term.digest).unit_doses
            for layer in term.layers:
                by_layer[layer] = by_layer.get(layer, 0.0) + abs(term.scale) * unit[layer]
        doses.append(max(by_layer.values()))
    return max(doses)


def scaled(plan: SteeringPlan, factor: float) -> SteeringPlan:
    """Returns the plan with every scale multiplied by ``factor``."""
    return SteeringPlan(
        tuple(
            replace(
                segment,
                terms=tuple(replace(term, scale=term.scale * factor) for term in segment.terms),
            )
            for segment in plan.segments
        )
    )


def count_steered(plan: SteeringPlan, num_tokens: int) -> int:
    """Returns how many of the first ``num_tokens`` positions are steered."""
    return sum(
        max(0, (num_tokens if s.end is None else min(s.end, num_tokens)) - s.start)
        for s in plan.segments
    )


def check_sums(plan: SteeringPlan, limit: int) -> None:
    """Checks that a plan needs no more rows of the bank than a request is promised.

    Args:
        plan: The plan.
        limit: ``ResolvedConfig.sums_per_request``.

    Raises:
        RequestError: It needs more.
    """
    count = len({segment.key for segment in plan.segments})
    if count > limit:
        raise RequestError(
            f"{REQUEST_KEY}.directions: their sum takes {count} different values over the positions, the server has "
            f"room for {limit} per request; ask for fewer ranges, or start the server with a higher --steering-rows"
        )


def _segments(spans: Sequence[tuple[Sequence[PositionRange], Term]]) -> list[Segment]:
    """Cuts overlapping ranges into disjoint ones; neighbours with equal sums become one."""
    edges = {edge for ranges, _ in spans for span in ranges for edge in span if edge is not None}
    cuts = sorted(edges)
    segments: list[Segment] = []
    for start, end in zip_longest(cuts, cuts[1:]):
        terms = tuple(
            sorted(
                (term for ranges, term in spans if any(_holds(span, start) for span in ranges)),
                key=lambda term: (term.digest, term.scale, term.layers),
            )
        )
        if not terms:
            continue
        if segments and (segments[-1].end, segments[-1].terms) == (start, terms):
            start = segments.pop().start
        segments.append(Segment(start, end, terms))
    return segments


def _holds(span: PositionRange, position: int) -> bool:
    start, end = span
    return start <= position and (end is None or position < end)


def _term(
    where: str, choice: DirectionChoice, request: SteeringRequest, direction: LoadedDirection
) -> Term:
    record = direction.record
    layers = sorted(set(choice.layers or request.layers or record.layers))
    unknown = [layer for layer in layers if layer not in record.layers]
    if unknown:
        raise RequestError(
            f"{where}.layers: direction {direction.full_name!r} has no vector for layers {unknown}; "
            f"it has {_ranges(record.layers)}"
        )
    scale = record.default_scale if choice.scale is None else choice.scale
    layer = max(layers, key=direction.unit_doses.__getitem__)
    limit = MAX_RELATIVE_SCALE / direction.unit_doses[layer]
    if abs(scale) > limit:
        raise DoseError(
            f"{where}.scale: {scale:g} would add a vector more than {MAX_RELATIVE_SCALE:g} times as long as the "
            f"residual stream at layer {layer}; |scale| must be at most {_floor(limit):g}, and up to "
            f"{record.safe_scale:g} the text was found fluent"
        )
    return Term(direction.digest, scale, tuple(layers))


def _floor(value: float, digits: int = 4) -> float:
    """Rounds down to ``digits`` significant digits, so that the limit shown is within the limit."""
    unit = 10.0 ** (math.floor(math.log10(value)) - digits + 1)
    return math.floor(value / unit) * unit


def _ranges(layers: Sequence[int]) -> str:
    """``[1, 2, 3, 7]`` as ``1-3, 7``."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
