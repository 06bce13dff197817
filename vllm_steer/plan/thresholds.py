"""Thresholds that requests name by the false-positive rate that a probe was measured at.

Importing this module imports neither torch nor vllm.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vllm_steer.errors import RequestError
from vllm_steer.fields import rate_of, show_layers
from vllm_steer.packs.probe import Probe
from vllm_steer.packs.registry import LoadedDirection
from vllm_steer.plan.binding import BoundChoice, BoundRequest
from vllm_steer.request.positions import PositionRange
from vllm_steer.request.reads import StopChoice


@dataclass(frozen=True)
class NamedThreshold:
    """A threshold of a manifest.

    Attributes:
        layer: The layer that it was measured at.
        above: The score.
    """

    layer: int
    above: float


def probe_of(direction: LoadedDirection) -> Probe:
    """Returns the probe of a direction.

    Raises:
        RequestError: It has none, or one whose thresholds say nothing of single tokens.
    """
    probe = direction.record.probe
    if probe is None:
        raise RequestError(
            f"direction {direction.full_name!r} has no probe, so there are no thresholds; give a number in 'above', or "
            f"measure the pack with `vllm-steer probe`"
        )
    if probe.score != "max":
        raise RequestError(
            f"the probe of {direction.full_name!r} was measured with --score {probe.score}, and any single token fires "
            f"here; give a number in 'above', or measure the pack with --score max"
        )
    return probe


def named_threshold(
    name: str, direction: LoadedDirection, layers: Sequence[int] | None
) -> NamedThreshold:
    """Returns the threshold that a request names.

    Args:
        name: Its name, ``fpr=`` and the rate.
        direction: The direction that has the probe.
        layers: Layers that the request names; None for the probe's.

    Raises:
        RequestError: The direction has no probe, or the probe no such rate or layer; the message says which there are.
    """
    probe = probe_of(direction)
    wanted = sorted(set(layers or [probe.layer]))
    found = probe.at(wanted[0])
    if len(wanted) > 1 or found is None:
        raise RequestError(
            f"thresholds are those of one layer, and layers {wanted} are named; the probe of {direction.full_name!r} was "
            f"measured at layers {show_layers([each.layer for each in probe.layers])}: name one of them, or none for layer "
            f"{probe.layer}"
        )
    rate = rate_of(name)
    for threshold in found.thresholds:
        if threshold.fpr == rate:
            return NamedThreshold(found.layer, threshold.above)
    there = ", ".join(repr(f"fpr={each:g}") for each in probe.rates)
    raise RequestError(
        f"{name!r} is no threshold of the probe of {direction.full_name!r}; there are {there}"
    )


def gate_threshold(choice: BoundChoice, layers: Sequence[int] | None) -> NamedThreshold | None:
    """Returns the threshold that a gate names; None where it gives a number, or there is no gate.

    Args:
        choice: The direction that has the gate.
        layers: Layers that the request names for it; None for none.

    Raises:
        RequestError: There is no such threshold; the message starts with the field.
    """
    gate = choice.form.gate
    if gate is None or gate.at is None:
        return None
    try:
        return named_threshold(gate.at, choice.partners["gate.direction"], layers)
    except RequestError as error:
        raise RequestError(f"{choice.where}.gate.at: {error}") from None


def rule_threshold(bound: BoundRequest, field: str, rule: StopChoice) -> NamedThreshold | None:
    """Returns the threshold that a rule names; None where it gives a number.

    Args:
        bound: The request that has it.
        field: Its field.
        rule: The rule.

    Raises:
        RequestError: As :func:`gate_threshold`.
    """
    if rule.at is None:
        return None
    read = bound.reads[rule.read]
    try:
        return named_threshold(rule.at, read.direction, read.choice.layers)
    except RequestError as error:
        raise RequestError(f"{bound.where}.{field}.at: {error}") from None


def check_named(bound: BoundRequest) -> None:
    """Checks that all thresholds exist which a request names.

    Raises:
        RequestError: One does not; the message starts with the field.
    """
    for choice in bound.choices:
        gate_threshold(choice, choice.choice.layers or bound.request.layers)
    for field, rule in bound.request.rules:
        rule_threshold(bound, field, rule)


def check_tokens(
    direction: LoadedDirection, ranges: Sequence[PositionRange], prompt_len: int
) -> None:
    """Checks that a named threshold is used on tokens like those that it was measured on.

    Args:
        direction: The direction that has the probe.
        ranges: Absolute positions that it looks at.
        prompt_len: Tokens of the prompt.

    Raises:
        RequestError: It is not.
    """
    tokens = probe_of(direction).tokens
    if tokens == "generated":
        fits = all(start >= prompt_len for start, _ in ranges)
    else:
        fits = all(0 < start and end is not None and end <= prompt_len for start, end in ranges)
    if not fits:
        right = "'generated'" if tokens == "generated" else f"[[1, {prompt_len}]]"
        raise RequestError(
            f"the probe of {direction.full_name!r} was measured on {tokens} tokens, and other positions are named; name "
            f"{right}, or give a number in 'above'"
        )
