"""What a request reads, as it travels to the engine: a direction by its content, layers, positions.

Importing this module imports neither torch nor vllm.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from vllm_steer.config import ResolvedConfig
from vllm_steer.errors import RequestError
from vllm_steer.fields import show_layers
from vllm_steer.plan.binding import BoundRead
from vllm_steer.request.positions import PositionRange, absolute_ranges
from vllm_steer.request.schema import REQUEST_KEY, SteeringRequest


@dataclass(frozen=True)
class Read:
    """One read: a score for every token in its ranges.

    Attributes:
        name: ``pack/direction`` as the request meant it, to be told what was read; no identity.
        digest: Content digest of the direction.
        layers: Layers, ascending; the score is the mean over them.
        after: Whether the request's own change of the layer is part of what is read.
        ranges: First position and the position after the last one, None for no end.
        above: The receipt says which share of an answer's scores is greater; None where it does not.
    """

    name: str
    digest: str
    layers: tuple[int, ...]
    after: bool
    ranges: tuple[PositionRange, ...]
    above: float | None = None

    @property
    def probe(self) -> tuple[str, bool]:
        """What the engine keeps in one row of its readers: equal probes share it."""
        return self.digest, self.after

    def prompt_tokens(self, prompt_len: int) -> int:
        """How many tokens of a prompt it has a score for, overlaps of its ranges counted again."""
        ends = ((start, prompt_len if end is None else end) for start, end in self.ranges)
        return sum(max(0, min(end, prompt_len) - start) for start, end in ends)

    def covers(self, positions: np.ndarray) -> np.ndarray:
        """Whether positions are read.

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
        above: Its score has to be greater.
        tokens: Tokens in a row that it has to be so for.
        abort: Whether the answer counts as aborted.
    """

    read: int
    above: float
    tokens: int
    abort: bool


def stop_reason(read: Read, above: float) -> str:
    """What the ``stop_reason`` of an answer says that a read has ended."""
    return f"{read.name} above {above:g}"


def probes_of(reads: Iterable[Read]) -> tuple[tuple[str, bool], ...]:
    """Returns the different probes of some reads, in the order in which they come first."""
    return tuple(dict.fromkeys(read.probe for read in reads))


def resolve_reads(
    bound: Iterable[BoundRead], prompt_len: int, max_len: int | None = None
) -> tuple[Read, ...]:
    """Turns what a request reads into layers and absolute positions.

    Args:
        bound: What was asked for.
        prompt_len: Number of tokens of the prompt.
        max_len: Most tokens of prompt and answer together, None when unknown.

    Raises:
        RequestError: A layer or position does not exist.
    """
    reads = []
    for read in bound:
        choice, direction = read.choice, read.direction
        layers = sorted(set(choice.layers or direction.record.steered_layers))
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
    """Returns rules of reads that come after some others."""
    return tuple(replace(stop, read=stop.read + others) for stop in rules)


def resolve_rules(
    request: SteeringRequest, reads: Sequence[Read], prompt_len: int
) -> tuple[StopRule, ...]:
    """Returns the rules by which reads end an answer.

    Args:
        request: What was asked for.
        reads: Its reads.
        prompt_len: Number of tokens of the prompt.

    Raises:
        RequestError: A rule looks at tokens that the prefix cache may have, and so might miss them.
    """
    rules = []
    for field, rule in (("stop_when", request.stop_when), ("abort_when", request.abort_when)):
        if rule is None:
            continue
        read = reads[rule.read]
        if not request.recompute and any(start < prompt_len for start, _ in read.ranges):
            raise RequestError(
                f"{REQUEST_KEY}.{field}: read {rule.read} has positions in the prompt, which has no scores where the "
                f"prefix cache has it; read 'generated' alone, or give \"recompute\": true"
            )
        rules.append(StopRule(rule.read, rule.above, rule.tokens, field == "abort_when"))
    return tuple(rules)


def check_reads(reads: Sequence[Read], config: ResolvedConfig) -> None:
    """Checks that an engine can carry out what is to be read.

    Args:
        reads: The reads.
        config: The engine's steering configuration.

    Raises:
        RequestError: It cannot; the message says how the server would have to be started.
    """
    if not reads:
        return
    if not config.reads:
        raise RequestError(
            f"{REQUEST_KEY}.read: this server reads nothing; start it with --steering-reads N, the most probes of a request"
        )
    count = len(probes_of(reads))
    if count > config.reads:
        raise RequestError(
            f"{REQUEST_KEY}.read: {count} different probes are named, the server has room for {config.reads} per request; "
            f"name fewer, or start the server with a higher --steering-reads"
        )
    for read in reads:
        others = sorted(set(read.layers) - set(config.layers))
        if others:
            raise RequestError(
                f"{REQUEST_KEY}.read: {read.name!r} is to be read at layers {others}, which this server does not hook; it "
                f"hooks {show_layers(config.layers)}"
            )
