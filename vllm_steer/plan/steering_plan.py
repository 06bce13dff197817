"""The plan sent to the engine: ranges of absolute token positions, and the terms that act there.

Its identity is the content of the vectors, never their names. Importing this module imports
neither torch nor vllm.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import astuple, dataclass, replace
from functools import cached_property, lru_cache
from itertools import combinations
from typing import Any, NamedTuple

from vllm_steer.operations import PLANE_OPS, Activation, Op
from vllm_steer.plan.reads import Read, StopRule, after_others
from vllm_steer.request.schedule import Schedule
from vllm_steer.request.stop_tokens import StopTokens
from vllm_steer.request.token_matches import TokenMatch, match_states


@dataclass(frozen=True)
class Form:
    """How a term acts; :data:`ADDITION` by default.

    Attributes:
        op: The form, ``vllm_steer.operations.OPS``.
        partner: Content digest of the direction that spans the plane or is read.
        bias: b of ``affine`` and ``feature``.
        gate: Content digest of the probe's direction.
        threshold: The probe fires above it; of ``feature``, which has no probe, θ of JumpReLU.
        restore_norm: Whether the norm of the residual stream is restored.
        slope: κ of a soft gate; 0 is a hard one.
        activation: ``feature``: what the scale does to the activation.
    """

    op: Op = "add"
    partner: str | None = None
    bias: float = 0.0
    gate: str | None = None
    threshold: float = 0.0
    restore_norm: bool = False
    slope: float = 0.0
    activation: Activation | None = None


ADDITION = Form()
# Limits of a plan's entries, which the planner checks for every token of a step, and of the terms of its ranges.
MAX_SEGMENTS = 128
MAX_PLAN_TERMS = 1024


@dataclass(frozen=True)
class Term:
    """One direction at some of its layers.

    Attributes:
        digest: Content digest of the direction.
        scale: ε.
        layers: Layers, ascending.
        form: How it acts.
        schedule: Factor of its change over the positions; None is 1 everywhere.
        match: The tokens that it acts on; None for all.
    """

    digest: str
    scale: float
    layers: tuple[int, ...]
    form: Form = ADDITION
    schedule: Schedule | None = None
    match: TokenMatch | None = None

    @cached_property
    def _hash(self) -> int:
        content = self.digest, self.scale, self.layers, self.form, self.schedule, self.match
        return hash(content)

    def __hash__(self) -> int:
        # Terms are looked up for every range.
        return self._hash

    @property
    def rank(self) -> int:
        """Components of the affine form that it takes at each layer; 0 for plain addition."""
        if self.form.op in PLANE_OPS:
            return 2
        return int(self.form.op != "add" or self.form.gate is not None)

    @property
    def gain(self) -> float:
        """Factor of the activation in the change of a feature: −1 where it is replaced, ε − 1 where it is multiplied."""
        return self.scale - 1.0 if self.form.activation == "multiply" else -1.0

    @property
    def added(self) -> float:
        """Multiple of the vector that a feature adds at every token: ε where the activation is set."""
        return 0.0 if self.form.activation == "multiply" else self.scale

    @property
    def peak(self) -> float:
        """Largest factor of its change, without its sign."""
        return max(abs(self.schedule.start), abs(self.schedule.end)) if self.schedule else 1.0

    @property
    def digests(self) -> tuple[str, ...]:
        """All content digests that it uses, its own first."""
        others = (self.form.partner, self.form.gate)
        return (self.digest, *(digest for digest in others if digest is not None))

    @cached_property
    def order(self) -> tuple[Any, ...]:
        """Sort key of the canonical order of a segment's terms."""
        # Without the match the order is the same.
        own = self.digest, self.scale, self.layers, repr(self.form), repr(self.schedule)
        return *own, repr(self.match)

    @cached_property
    def identity(self) -> str:
        """Equal for bit-equal changes, regardless of the schedule and the match."""
        content = [self.digest, float(self.scale).hex(), self.layers]
        if self.form != ADDITION:
            content += [v.hex() if isinstance(v, float) else v for v in astuple(self.form)]
        return json.dumps(content)


@dataclass(frozen=True)
class Segment:
    """A range of absolute token positions and the terms that act there together.

    Attributes:
        start: First position.
        end: Position after the last one; None has no end.
        terms: The terms in canonical order, at least one.
        stop: Generated tokens after which the range ends early. It is not part of the identity: requests
            whose ranges end at the same position are equal there. For the same reason, neither are matches.
    """

    start: int
    end: int | None
    terms: tuple[Term, ...]
    stop: StopTokens | None = None

    @cached_property
    def matches(self) -> tuple[TokenMatch, ...]:
        """The distinct matches of the terms, in order."""
        found = dict.fromkeys(term.match for term in self.terms)
        return tuple(match for match in found if match is not None)

    def where(self, holding: Collection[TokenMatch]) -> Segment | None:
        """Returns what acts on tokens where some matches hold, without matches; None for nothing."""
        kept = [term for term in self.terms if term.match is None or term.match in holding]
        plain = tuple(replace(term, match=None) if term.match else term for term in kept)
        return replace(self, terms=plain) if plain else None

    @cached_property
    def schedules(self) -> tuple[Schedule | None, ...]:
        """The distinct schedules of the terms, in order."""
        return _schedules(self.terms)

    @cached_property
    def row_key(self) -> str:
        """Content identity of the terms: equal keys are equal rows, bit for bit.

        Terms with the same factor are together in a row, so the grouping is part of it, but the schedules are
        not.
        """
        return _row_key(self.terms)

    @cached_property
    def key(self) -> str:
        """Content identity of the change: equal keys are equal changes at equal positions."""
        if self.schedules == (None,):
            return self.row_key
        known = [schedule.to_list() if schedule else [] for schedule in self.schedules]
        return _digest([self.row_key, [[float(v).hex() for v in values] for values in known]])


def _schedules(terms: tuple[Term, ...]) -> tuple[Schedule | None, ...]:
    return tuple(dict.fromkeys(term.schedule for term in terms))


# The same terms occur in many ranges, and in the plans of many prompts.
@lru_cache(maxsize=4096)
def _row_key(terms: tuple[Term, ...]) -> str:
    identities, schedules = [term.identity for term in terms], _schedules(terms)
    if len(schedules) == 1:
        return _digest(identities)
    return _digest([identities, [schedules.index(term.schedule) for term in terms]])


class Entry(NamedTuple):
    """What acts on the tokens of a range where the matches have given states.

    Attributes:
        segment: The range and the terms, without matches.
        mask: Bits of the matches that count, by their index in the plan.
        state: These bits where they hold.
    """

    segment: Segment
    mask: int = 0
    state: int = 0


@dataclass(frozen=True)
class SteeringPlan:
    """The steering of one request by absolute position, and its reads.

    Attributes:
        segments: Disjoint, ascending.
        reads: The reads, in the request's order; not part of any identity, since they change nothing.
        rules: Rules by which reads end the answer.
    """

    segments: tuple[Segment, ...]
    reads: tuple[Read, ...] = ()
    rules: tuple[StopRule, ...] = ()

    @property
    def stop(self) -> StopTokens | None:
        """The triggers, which all segments share."""
        return self.segments[0].stop if self.segments else None

    @cached_property
    def matches(self) -> tuple[TokenMatch, ...]:
        """The distinct matches of its terms, in order."""
        return tuple(dict.fromkeys(match for s in self.segments for match in s.matches))

    @cached_property
    def entries(self) -> tuple[Entry, ...]:
        """What acts where: at most one entry for each token; those of one range follow each other."""
        return tuple(entry for segment in self.segments for entry in self._entries(segment))

    def _entries(self, segment: Segment) -> Iterator[Entry]:
        own = segment.matches
        if not own:
            yield Entry(segment)
            return
        bits = {match: 1 << self.matches.index(match) for match in own}
        for count in range(len(own) + 1):
            for holding in combinations(own, count):
                acting = segment.where(holding)
                if acting is not None:
                    held = sum(bits[match] for match in holding)
                    yield Entry(acting, sum(bits.values()), held)

    @cached_property
    def sums(self) -> dict[str, Segment]:
        """What each of its rows holds, by the row's key."""
        return {entry.segment.row_key: entry.segment for entry in self.entries}

    def watched(self, watch: SteeringPlan) -> SteeringPlan:
        """Returns the plan with the reads of another one appended."""
        rules = self.rules + after_others(watch.rules, len(self.reads))
        return replace(self, reads=self.reads + watch.reads, rules=rules)

    @cached_property
    def meetings(self) -> tuple[tuple[Term, ...], ...]:
        """The distinct tuples of terms that meet at a position, in order of first use."""
        # Most are one object, and to hash all the ranges' terms takes longer than to plan them.
        objects = {id(segment.terms): segment.terms for segment in self.segments}
        return tuple(dict.fromkeys(objects.values()))

    @cached_property
    def terms(self) -> tuple[Term, ...]:
        """Its distinct terms, in order of first use."""
        return tuple(dict.fromkeys(term for terms in self.meetings for term in terms))

    @cached_property
    def digests(self) -> frozenset[str]:
        """All content digests that it uses."""
        steering = {digest for term in self.terms for digest in term.digests}
        return frozenset(steering | {read.digest for read in self.reads})


def count_steered(plan: SteeringPlan, num_tokens: int) -> int:
    """Returns how many of the first ``num_tokens`` positions are steered, if no trigger occurs and matches hold."""
    return sum(
        max(0, (num_tokens if s.end is None else min(s.end, num_tokens)) - s.start)
        for s in plan.segments
    )


def count_matched(plan: SteeringPlan, tokens: Sequence[int]) -> int:
    """Returns how many of a request's first tokens are steered, if no trigger occurs.

    Args:
        plan: The plan.
        tokens: The tokens, from the prompt's first.
    """
    states = match_states(plan.matches, tokens)
    return sum(
        int((states[entry.segment.start : entry.segment.end] & entry.mask == entry.state).sum())
        for entry in plan.entries
    )


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]
