"""Bound request + prompt length -> plan: which terms act at which token positions.

Importing this module imports neither torch nor vllm.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import zip_longest

import numpy as np

from vllm_steer.errors import RequestError
from vllm_steer.fields import show_layers
from vllm_steer.operations import LINEAR_OPS, PLANE_OPS, READING_OPS, FormChoice
from vllm_steer.packs.registry import LoadedDirection
from vllm_steer.plan.binding import BoundChoice, BoundRequest
from vllm_steer.plan.dose import check_scale
from vllm_steer.plan.reads import resolve_reads, resolve_rules
from vllm_steer.plan.steering_plan import (
    MAX_PLAN_TERMS,
    MAX_SEGMENTS,
    Form,
    Segment,
    SteeringPlan,
    Term,
)
from vllm_steer.plan.strength import check_calibrated, scale_of
from vllm_steer.plan.thresholds import check_tokens, gate_threshold
from vllm_steer.request.positions import (
    AnyPositions,
    PositionRange,
    TokenPositions,
    absolute_ranges,
)
from vllm_steer.request.schedule import Schedule
from vllm_steer.request.schema import (
    MAX_REQUEST_RANGES,
    REQUEST_KEY,
    DirectionChoice,
    SteeringRequest,
)
from vllm_steer.request.stop_tokens import StopTokens
from vllm_steer.request.token_matches import MAX_MATCHES, TokenMatch

_Span = tuple[Sequence[PositionRange], Term]
# Two directions with a smaller angle between them (its sine) span no plane.
_LEAST_SINE = 1e-3


def resolve(bound: BoundRequest, prompt_len: int, max_len: int | None = None) -> SteeringPlan:
    """Turns a request into ranges of absolute token positions.

    Args:
        bound: The request.
        prompt_len: Number of tokens of the prompt.
        max_len: Most tokens of prompt and answer together, None when unknown.

    Returns:
        The plan; without segments if it changes nothing.

    Raises:
        RequestError: A layer or position does not exist, or a number is out of range.
    """
    request, spans = bound.request, []
    for choice in bound.choices:
        term = _term(choice, bound, prompt_len)
        chosen = choice.choice.positions
        positions = chosen or request.positions or choice.direction.record.positions
        try:
            ranges = absolute_ranges(positions, prompt_len, max_len)
        except RequestError as error:
            owner = choice.where if chosen else REQUEST_KEY
            raise RequestError(f"{owner}.positions: {error}") from None
        if choice.form.gate and choice.form.gate.at:
            try:
                check_tokens(choice.partners["gate.direction"], ranges, prompt_len)
            except RequestError as error:
                raise RequestError(f"{choice.where}.gate.at: {error}") from None
        if not _is_idle(term):
            spans.append((ranges, replace(term, match=_match(positions, ranges))))
    # A pack's own positions may be ranges, too.
    if (count := sum(len(ranges) for ranges, _ in spans)) > MAX_REQUEST_RANGES:
        raise RequestError(
            f"{REQUEST_KEY}.directions: they have {count} ranges of positions in total; the limit is "
            f"{MAX_REQUEST_RANGES}; name fewer directions, or give fewer ranges"
        )
    triggers = request.until_token_ids
    stop = StopTokens(prompt_len, tuple(triggers)) if triggers else None
    reads = resolve_reads(bound, prompt_len, max_len)
    rules = resolve_rules(bound, reads, prompt_len)
    plan = SteeringPlan(tuple(_segments(spans, stop)), reads, rules)
    _check_matches(plan)
    return plan


def _match(positions: AnyPositions, ranges: Sequence[PositionRange]) -> TokenMatch | None:
    """The tokens that a direction acts on; None for all in its ranges."""
    if not isinstance(positions, TokenPositions):
        return None
    # The ranges alone limit which tokens count, unless one of them matters to those after it.
    origin = min(start for start, _ in ranges) if positions.onward else 0
    return TokenMatch(origin, positions.tokens, positions.onward)


def _check_matches(plan: SteeringPlan) -> None:
    """Raises RequestError if a plan has too many different choices of token ids, or entries by them."""
    if len(plan.matches) > MAX_MATCHES:
        raise RequestError(
            f"{REQUEST_KEY}.directions: their positions have {len(plan.matches)} different choices of token ids, and the "
            f"limit is {MAX_MATCHES}; give directions the same ids"
        )
    if plan.matches and len(plan.entries) > MAX_SEGMENTS:
        raise RequestError(
            f"{REQUEST_KEY}.directions: their token ids and ranges have {len(plan.entries)} combinations; the limit is "
            f"{MAX_SEGMENTS}; give fewer ranges, or directions the same ids"
        )


def check_token_ids(bound: BoundRequest, vocabulary: int) -> None:
    """Checks that the token ids of a request are the model's.

    Args:
        bound: The request.
        vocabulary: Number of the model's token ids.

    Raises:
        RequestError: One is not; the message starts with the field.
    """
    request = bound.request
    named: list[tuple[str, Sequence[int]]] = [
        (f"{bound.where}.until_token_ids", request.until_token_ids or ())
    ]
    for choice in bound.choices:
        own, owner = choice.choice.positions, choice.where
        if own is None and request.positions is not None:
            own, owner = request.positions, bound.where
        positions = own or choice.direction.record.positions
        if isinstance(positions, TokenPositions):
            named.append((f"{owner}.positions", positions.tokens))
    for field, ids in named:
        if unknown := [number for number in ids if number >= vocabulary]:
            raise RequestError(
                f"{field}: {unknown[0]} is no token id of this model, which has 0 to {vocabulary - 1}"
            )


def _segments(spans: Sequence[_Span], stop: StopTokens | None) -> list[Segment]:
    """Splits overlapping ranges into disjoint ones; neighbours with equal sums are merged.

    Raises:
        RequestError: There are too many ranges or terms.
    """
    spans = sorted(spans, key=lambda span: span[1].order)
    # Change in the number of ranges of each span from the position before.
    steps: dict[int, list[tuple[int, int]]] = {}
    for number, (ranges, _) in enumerate(spans):
        for start, end in ranges:
            steps.setdefault(start, []).append((number, 1))
            if end is not None:
                steps.setdefault(end, []).append((number, -1))
    cuts = sorted(steps)
    segments: list[Segment] = []
    terms = [term for _, term in spans]
    depth, size = [0] * len(spans), 0
    # Equal sums are one object, which whoever looks at each of them once goes by.
    sums: dict[tuple[int, ...], tuple[Term, ...]] = {}
    for start, end in zip_longest(cuts, cuts[1:]):
        for number, step in steps[start]:
            depth[number] += step
        inside = tuple([number for number, count in enumerate(depth) if count])
        here = sums.setdefault(inside, ()) or tuple([terms[number] for number in inside])
        sums[inside] = here
        size += len(here)
        if size > MAX_PLAN_TERMS:
            raise RequestError(
                f"{REQUEST_KEY}.directions: the ranges of positions have more than {MAX_PLAN_TERMS} terms in total; name "
                f"fewer directions, or give fewer ranges"
            )
        if not here:
            continue
        segment = Segment(start, end, here, stop)
        if segments and segments[-1].end == start and segments[-1].terms == here:
            segment = Segment(segments.pop().start, end, here, stop)
        segments.append(segment)
    if len(segments) > MAX_SEGMENTS:
        raise RequestError(
            f"{REQUEST_KEY}.directions: their positions split into {len(segments)} distinct ranges; the limit is "
            f"{MAX_SEGMENTS}; give fewer or longer ranges"
        )
    return segments


def _term(bound: BoundChoice, whole: BoundRequest, prompt_len: int) -> Term:
    where, choice, direction = bound.where, bound.choice, bound.direction
    request, registry = whole.request, whole.registry
    named = choice.layers or request.layers
    gate = gate_threshold(bound, named)
    layers = sorted(set(named or ([gate.layer] if gate else direction.record.steered_layers)))
    _check_layers(f"{where}.layers", direction, layers)
    form = _form(bound, layers)
    if gate is not None:
        # The gate's reader has the length of its vector, a score that of 1.
        probe = bound.partners["gate.direction"]
        form = replace(form, threshold=gate.above * probe.lengths[gate.layer])
    field = "scale"
    if choice.strength is None:
        scale = _scale(where, choice, bound.form, direction)
    else:
        field = "strength"
        try:
            check_calibrated(choice, direction)
            scale = scale_of(choice.strength, direction, form, layers, registry)
        except RequestError as error:
            raise RequestError(f"{where}.{error}") from None
    schedule = _schedule(where, choice, request, form, prompt_len)
    term = Term(direction.digest, scale, tuple(layers), form, schedule)
    check_scale(f"{where}.{field}", term, direction, registry)
    return term


def _form(bound: BoundChoice, layers: Sequence[int]) -> Form:
    where, chosen = bound.where, bound.form
    op = chosen.op or "add"
    field = "plane" if op in PLANE_OPS else "read"
    if op == "feature" and chosen.gate is not None:
        raise RequestError(
            f"{where}.gate: op 'feature' acts only where the feature is active, and takes no other gate"
        )
    if op in (*PLANE_OPS, *READING_OPS) and field not in bound.partners:
        raise RequestError(f"{where}.{field}: op {op!r} needs the name of a second direction")
    for part, direction in bound.partners.items():
        _check_layers(f"{where}.{part}", direction, layers)
    partner, gate = (bound.partners.get(part) for part in (field, "gate.direction"))
    if op in PLANE_OPS and partner is not None:
        _check_plane(f"{where}.{field}", bound.direction, partner, layers)
    return Form(
        op,
        partner.digest if partner else None,
        chosen.bias or 0.0,
        gate.digest if gate else None,
        (chosen.gate.above or 0.0) if chosen.gate else chosen.threshold or 0.0,
        bool(chosen.restore_norm),
        (chosen.gate.slope or 0.0) if chosen.gate else 0.0,
        (chosen.activation or "set") if op == "feature" else None,
    )


def _scale(
    where: str, choice: DirectionChoice, chosen: FormChoice, direction: LoadedDirection
) -> float:
    if choice.scale is not None:
        return choice.scale
    op = chosen.op or "add"
    own = direction.record.form or FormChoice()
    if op == direction.record.op and (chosen.activation or "set") == (own.activation or "set"):
        return direction.record.default_scale
    if op == "ablate":
        return 1.0
    what = f"op {op!r}" + (f" with activation {chosen.activation!r}" if chosen.activation else "")
    raise RequestError(
        f"{where}.scale: {what} needs a scale; {direction.full_name!r} has a default only for its own op"
    )


def _check_layers(where: str, direction: LoadedDirection, layers: Sequence[int]) -> None:
    known = direction.record.layers
    unknown = [layer for layer in layers if layer not in direction.rows]
    if unknown:
        raise RequestError(
            f"{where}: direction {direction.full_name!r} has no vector for layers {unknown}; "
            f"it has {show_layers(known)}"
        )


def _check_plane(
    where: str, direction: LoadedDirection, other: LoadedDirection, layers: Sequence[int]
) -> None:
    for layer in layers:
        a, b = (d.at(layer).astype(np.float64) / d.lengths[layer] for d in (direction, other))
        if np.linalg.norm(b - (a @ b) * a) < _LEAST_SINE:
            raise RequestError(
                f"{where}: {direction.full_name!r} and {other.full_name!r} are parallel at layer {layer}, so they span "
                f"no plane; name another direction"
            )


def _schedule(
    where: str, choice: DirectionChoice, request: SteeringRequest, form: Form, prompt_len: int
) -> Schedule | None:
    chosen = choice.schedule or request.schedule
    if chosen is None:
        return None
    if form.op not in LINEAR_OPS or form.restore_norm:
        owner = where if choice.schedule else REQUEST_KEY
        what = "restore_norm" if form.restore_norm else f"op {form.op!r}"
        raise RequestError(
            f"{owner}.schedule: {what} has no strength to schedule; give positions, such as "
            f'{{"generated": [0, 16]}}'
        )
    return Schedule.of(chosen, prompt_len)


def _is_idle(term: Term) -> bool:
    """Whether a term changes nothing."""
    if term.form.op == "feature":
        return term.gain == term.added == 0.0
    return term.scale == 0.0 and term.form.op in (*LINEAR_OPS, "rotate")
