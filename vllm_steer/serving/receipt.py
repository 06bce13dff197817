"""Receipts: the steering that was applied to a request, for its response.

Importing this module imports neither torch nor vllm.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from urllib.parse import quote

from vllm_steer.plan.steering_plan import ADDITION, SteeringPlan, Term, count_steered

HEADER = "x-steering"
# Proxies refuse long headers; the body has everything.
MAX_HEADER = 2048
RECEIPT_FIELDS = {
    "directions": "Each direction's `name`, `scale`, `layers` and content `digest`, as carried out; the `strength`, "
    "`scale` over the default scale, of a calibrated direction in its own form on its default layers, and none "
    "otherwise; the `op` with what belongs to it, where that is not addition; and the `schedule` if there is one.",
    "positions": "Ranges of absolute token positions, `start` to before `end` (null: to the end), each with the "
    "indices of the directions that are summed there.",
    "dose": "Largest dose over the positions, once it was limited: 1 is the largest at which text was found fluent, or, of "
    "directions that nobody calibrated, Σ&#124;ε&#124;·‖v‖ over their layers, each over the median norm of the residual "
    "stream there.",
    "dose_factor": "Factor that the server multiplied all scales by; 1 when it kept them.",
    "tokens_steered": "Tokens that went through the model at steered positions, of prompt and answers; the last "
    "token of an answer does not.",
}


class LimitedPlan(NamedTuple):
    """A plan whose dose the server allows.

    Attributes:
        plan: The plan, its scales lowered where the policy says so.
        dose: Its largest dose over the positions.
        factor: What all scales were multiplied by; 1 when the request's own were kept.
    """

    plan: SteeringPlan
    dose: float
    factor: float = 1.0


@dataclass(eq=False)
class Receipt:
    """The steering of one prompt as it was carried out.

    Attributes:
        plan: The plan that the engine got.
        names: ``pack/direction`` by content digest, as loaded when the request came.
        prompt_len: Tokens of the prompt.
        num_choices: Answers to the prompt (``n``).
        dose: Largest dose over the positions, once it was limited.
        dose_factor: Factor that all scales were multiplied by; 1 when the request's own were kept.
        strengths: Scale over default scale, once it was limited, of the terms that have a strength.
        answered: Tokens generated so far by index of the answer; filled while the engine runs.
        ended: Tokens of each answer up to its trigger, where it has met one.
    """

    plan: SteeringPlan
    names: dict[str, str]
    prompt_len: int
    num_choices: int
    dose: float
    dose_factor: float
    strengths: Mapping[Term, float] = field(default_factory=dict)
    answered: dict[int, int] = field(default_factory=dict)
    ended: dict[int, int] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        limited: LimitedPlan,
        names: Mapping[str, str],
        prompt_len: int,
        num_choices: int = 1,
        strengths: Mapping[Term, float] | None = None,
    ) -> Receipt:
        """Makes the receipt of a plan; ``names`` has those of its directions, by digest."""
        plan, dose, factor = limited
        kept = {digest: name for digest, name in names.items() if digest in plan.digests}
        return cls(plan, kept, prompt_len, num_choices, dose, factor, strengths or {})

    def count(self, choice: int, tokens: Sequence[int], before: int) -> None:
        """Counts tokens of an answer.

        Args:
            choice: Index of the answer.
            tokens: Tokens generated.
            before: How many it had before them.
        """
        self.answered[choice] = before + len(tokens)
        triggers = self.plan.stop.tokens if self.plan.stop else ()
        if choice not in self.ended and triggers:
            found = (number for number, token in enumerate(tokens) if token in triggers)
            if (first := next(found, None)) is not None:
                self.ended[choice] = before + first + 1

    def tokens_steered(self, choice: int | None = None) -> int:
        """Tokens that went through the model at steered positions.

        The last token of an answer is not counted: the model never reads it.

        Args:
            choice: Index of one answer; None counts all.
        """
        counts = self.answered if choice is None else {choice: self.answered.get(choice, 0)}
        return sum(
            count_steered(
                self.plan,
                self.prompt_len + min(max(0, count - 1), self.ended.get(index, count)),
            )
            for index, count in counts.items()
        )

    def to_json(self, choice: int | None = None) -> dict[str, Any]:
        """Returns the receipt for a response's body, with counts of one answer or of all."""
        terms = self.plan.terms
        numbers = {term: number for number, term in enumerate(terms)}
        return {
            "directions": [
                {
                    "name": self.names[term.digest],
                    "scale": term.scale,
                    "layers": list(term.layers),
                    "digest": term.digest,
                }
                | self._strength(term)
                | self._form(term)
                | ({"schedule": term.schedule.to_json()} if term.schedule else {})
                for term in terms
            ],
            "positions": [
                {
                    "start": segment.start,
                    "end": segment.end,
                    "directions": [numbers[term] for term in segment.terms],
                }
                for segment in self.plan.segments
            ],
            "dose": round(self.dose, 6),
            "dose_factor": self.dose_factor,
            "tokens_steered": self.tokens_steered(choice),
        }

    def to_header(self) -> str:
        """Returns the directions and scales for a header, which goes out before any token."""
        parts = [
            f"{quote(self.names[term.digest], safe='/')}:{term.scale:g}" for term in self.plan.terms
        ]
        shown = ", ".join(parts)
        while len(shown) > MAX_HEADER:
            parts.pop()
            shown = ", ".join([*parts, "..."])
        return shown

    def _strength(self, term: Term) -> dict[str, float]:
        """The strength of a term that has one, rounded like the dose."""
        return {"strength": round(self.strengths[term], 6)} if term in self.strengths else {}

    def _form(self, term: Term) -> dict[str, Any]:
        """How a term acts, where it does not just add."""
        form = term.form
        if form == ADDITION:
            return {}
        found: dict[str, Any] = {"op": form.op}
        if form.partner is not None:
            key = "read" if form.op == "affine" else "plane"
            found |= {key: self.names[form.partner], f"{key}_digest": form.partner}
        if form.op == "affine":
            found["bias"] = form.bias
        if form.gate is not None:
            gate = {"direction": self.names[form.gate], "digest": form.gate}
            found["gate"] = gate | {"above": form.threshold}
        return found | {"restore_norm": form.restore_norm}
