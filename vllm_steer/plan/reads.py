"""Reads as sent to the engine: a direction by content, layers, positions.

Importing this module imports neither torch nor vllm.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from vllm_steer.config import ResolvedConfig
from vllm_steer.errors import RequestError
from vllm_steer.fields import show_layers
from vllm_steer.plan.binding import BoundRead, BoundRequest
from vllm_steer.plan.thresholds import check_tokens, rule_threshold
from vllm_steer.request.positions import PositionRange, absolute_ranges
from vllm_steer.request.schema import REQUEST_KEY


@dataclass(frozen=True)
class Read:
    """One read: a score for every token in its ranges.

    Attributes:
        name: ``pack/direction``, for receipts; not part of the identity.
        digest: Content digest of the direction.
        layers: Layers, ascending; the score is the mean over them.
        after: Whether the read includes the request's own change at the layer.
        ranges: First position and the position after the last one, None for no end.
        above: The receipt gives the share of an answer's scores that are greater; None for no share.
    """

    name: str
    digest: str
    layers: tuple[int, ...]
    after: bool
    ranges: tuple[PositionRange, ...]
    above: float | None = None

    @property
    def probe(self) -> tuple[str, bool]:
        """Key of the engine's reader row: equal probes share one."""
        return self.digest, self.after

    def prompt_tokens(self, prompt_len: int) -> int:
        """How many tokens of a prompt it has a score for, overlaps of its ranges counted again."""
        ends = ((start, prompt_len if end is None else end) for start, end in self.ranges)
        return sum(max(0, min(end, prompt_len) - start) for start, end in ends)

    def covers(self, positions: np.ndarray) -> np.ndarray:
        """Returns which positions are read.

        Args:
            positions: int ``[n]``, absolute.

        Returns:
            bool ``[n]``.
        """
        inside = np.zeros(len(positions), dtype=bool)
        for start, end in self.ranges:
            inside |= (positions >= start) & (True if end is None else positions < end)
        return inside


@dataclass(frozen=True)
class StopRule:
    """A rule by which a read ends the answer.

    Attributes:
        read: Index of the read.
        above: Threshold that the score must exceed.
        tokens: Consecutive tokens that must exceed it.
        abort: Whether the answer counts as aborted.
    """

    read: int
    above: float
    tokens: int
    abort: bool


def stop_reason(read: Read, above: float) -> str:
    """Returns the ``stop_reason`` of an answer ended by a read."""
    return f"{read.name} above {above:g}"


def probes_of(reads: Iterable[Read]) -> tuple[tuple[str, bool], ...]:
    """Returns the distinct probes of some reads, in order of first use."""
    return tuple(dict.fromkeys(read.probe for read in reads))


def resolve_reads(
    bound: BoundRequest, prompt_len: int, max_len: int | None = None
) -> tuple[Read, ...]:
    """Resolves reads to layers and absolute positions.

    Args:
        bound: The reads of a request.
        prompt_len: Number of tokens of the prompt.
        max_len: Most tokens of prompt and answer together, None when unknown.

    Raises:
        RequestError: A layer or position does not exist.
    """
    by_probe = {rule.read for _, rule in bound.request.rules if rule.at}
    reads = []
    for number, read in enumerate(bound.reads):
        choice, direction = read.choice, read.direction
        probe = direction.record.probe if number in by_probe else None
        default = [probe.layer] if probe else direction.record.steered_layers
        layers = sorted(set(choice.layers or default))
        unknown = [layer for layer in layers if layer not in direction.rows]
        if unknown:
            raise RequestError(
                f"{read.where}.layers: direction {direction.full_name!r} has no vector for layers {unknown}; it has "
                f"{show_layers(direction.record.layers)}"
            )
        try:
            ranges = absolute_ranges(choice.at, prompt_len, max_len)
        except RequestError as error:
            raise RequestError(f"{read.where}.at: {error}") from None
        after = choice.when == "after"
        content = direction.full_name, direction.digest, tuple(layers), after
        reads.append(Read(*content, tuple(ranges), choice.above))
    return tuple(reads)


def after_others(rules: Iterable[StopRule], others: int) -> tuple[StopRule, ...]:
    """Returns the rules with read indices shifted by ``others``."""
    return tuple(replace(stop, read=stop.read + others) for stop in rules)


def resolve_rules(
    bound: BoundRequest, reads: Sequence[Read], prompt_len: int
) -> tuple[StopRule, ...]:
    """Returns the rules by which reads end an answer.

    Args:
        bound: The request.
        reads: Its reads.
        prompt_len: Number of tokens of the prompt.

    Raises:
        RequestError: A rule applies to tokens that the prefix cache may skip, or names a threshold that does
            not exist.
    """
    request, rules = bound.request, []
    for field, rule in request.rules:
        read = reads[rule.read]
        if not request.recompute and any(start < prompt_len for start, _ in read.ranges):
            raise RequestError(
                f"{REQUEST_KEY}.{field}: read {rule.read} has positions in the prompt, which has no scores on a "
                f"prefix-cache hit; read only 'generated', or give \"recompute\": true"
            )
        named = rule_threshold(bound, field, rule)
        if named is not None:
            _check_as_measured(
                f"{bound.where}.{field}.at", bound.reads[rule.read], read, prompt_len
            )
        above = named.above if named else rule.above
        assert above is not None
        rules.append(StopRule(rule.read, above, rule.tokens, field == "abort_when"))
    return tuple(rules)


def _check_as_measured(field: str, bound: BoundRead, read: Read, prompt_len: int) -> None:
    """Raises RequestError where a threshold is named of what is not read as it was measured."""
    if read.after:
        raise RequestError(
            f"{field}: thresholds were measured on what the block returns, and the read says 'after'; give a number in "
            f"'above'"
        )
    try:
        check_tokens(bound.direction, read.ranges, prompt_len)
    except RequestError as error:
        raise RequestError(f"{field}: {error}") from None


def check_reads(reads: Sequence[Read], config: ResolvedConfig) -> None:
    """Checks that an engine can carry out reads.

    Args:
        reads: The reads.
        config: The engine's steering configuration.

    Raises:
        RequestError: It cannot; the message says how to start the server.
    """
    if not reads:
        return
    if not config.reads:
        raise RequestError(
            f"{REQUEST_KEY}.read: this server does not support reads; start it with --steering-reads N"
        )
    count = len(probes_of(reads))
    if count > config.reads:
        raise RequestError(
            f"{REQUEST_KEY}.read: {count} distinct probes are named, and the limit is {config.reads} per request; "
            f"name fewer, or start the server with a higher --steering-reads"
        )
    for read in reads:
        others = sorted(set(read.layers) - set(config.layers))
        if others:
            raise RequestError(
                f"{REQUEST_KEY}.read: {read.name!r} cannot be read at layers {others}, which this server does not hook; it "
                f"hooks {show_layers(config.layers)}"
            )
