"""Receipts: the steering that was applied to a request, for its response.

Importing this module imports neither torch nor vllm.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np

from vllm_steer.operations import READING_OPS
from vllm_steer.plan.reads import Read
from vllm_steer.plan.scores import Scores
from vllm_steer.plan.steering_plan import ADDITION, SteeringPlan, Term, count_matched, count_steered

HEADER = "x-steering"
# Proxies refuse long headers; the body is complete.
MAX_HEADER = 2048
# The key in a chunk of a stream.
SCORES_KEY = "steering_scores"
RECEIPT_FIELDS = {
    "directions": "Each direction's `name`, `scale`, `layers` and content `digest`, as carried out; the `strength`, "
    "`scale` divided by the default scale, of a calibrated direction in its default form on its default layers, and none "
    "otherwise; the `op` with its fields, if it is not addition; the `schedule` if there is one; and `tokens`, the token "
    "ids that it acts on alone, or `from_tokens`, those from the first of which on it acts, looked for from position "
    "`origin` on.",
    "positions": "Ranges of absolute token positions, `start` to before `end` (null: to the end), each with the "
    "indices of the directions summed there; those with token ids act on these tokens alone.",
    "dose": "Largest dose over the positions, after limiting: 1 is the largest at which text was fluent, or, for "
    "uncalibrated directions, Σ&#124;ε&#124;·‖v‖ over their layers, each divided by the median norm of the residual "
    "stream there.",
    "dose_factor": "Factor by which the server multiplied all scales; 1 if unchanged.",
    "tokens_steered": "Tokens that went through the model at steered positions, of prompt and answers; the last "
    "token of an answer does not.",
    "reads": "Where the request reads: the `name`, `layers`, content `digest` and `when` of each read, and in `answers` "
    "the scores of each answer to the prompt by its `index`, one for each token, in `prompt` and `generated`, each "
    "present if the read has positions there. A score is the projection onto the unit vector, averaged over the layers; "
    "null where the model did not read the token (the last of an answer, and prompt tokens found in "
    "the prefix cache), where the read does not cover it, or where the stream is not finite. Also the `mean` "
    "and `max` of an answer's scores, and `share_above`, the share of scores greater than the read's `above`.",
}
# Digits of rounded scores, below float32's precision.
_DIGITS = 6


class LimitedPlan(NamedTuple):
    """A plan with an allowed dose.

    Attributes:
        plan: The plan, with scales reduced if the policy says so.
        dose: Its largest dose over the positions.
        factor: Factor of all scales; 1 if unchanged.
    """

    plan: SteeringPlan
    dose: float
    factor: float = 1.0


@dataclass(eq=False)
class Receipt:
    """The steering of one prompt as carried out.

    Attributes:
        plan: The engine's plan.
        names: ``pack/direction`` by content digest, as loaded at admission.
        prompt_len: Tokens of the prompt.
        num_choices: Answers to the prompt (``n``).
        dose: Largest dose over the positions, after limiting.
        dose_factor: Factor of all scales; 1 if unchanged.
        strengths: Scale divided by default scale, after limiting, of the terms that have a strength.
        answered: Tokens generated so far by index of the answer; filled while the engine runs.
        ended: Tokens of each answer up to its trigger, if there was one.
        scores: Scores of each answer, by its index; filled while the engine runs.
        prompt_tokens: Token ids of the prompt, if token ids decide what is steered.
        generated: Likewise of each answer, by its index; filled while the engine runs.
        own_reads: Number of the plan's first reads that are the request's; the others are the operator's.
        silent: Whether only the operator reads, and the request has no steering.
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
    scores: dict[int, Scores] = field(default_factory=dict)
    prompt_tokens: Sequence[int] = ()
    generated: dict[int, list[int]] = field(default_factory=dict)
    own_reads: int = 0
    silent: bool = False

    @classmethod
    def of(
        cls,
        limited: LimitedPlan,
        names: Mapping[str, str],
        prompt_len: int,
        num_choices: int = 1,
        strengths: Mapping[Term, float] | None = None,
    ) -> Receipt:
        """Makes the receipt of a plan; ``names`` are those of its directions, by digest."""
        plan, dose, factor = limited
        kept = {digest: name for digest, name in names.items() if digest in plan.digests}
        made = cls(plan, kept, prompt_len, num_choices, dose, factor, strengths or {})
        made.own_reads = len(plan.reads)
        return made

    def count(self, choice: int, tokens: Sequence[int], before: int) -> None:
        """Counts tokens of an answer.

        Args:
            choice: Index of the answer.
            tokens: Tokens generated.
            before: Number of tokens before them.
        """
        self.answered[choice] = before + len(tokens)
        if self.plan.matches:
            self.generated.setdefault(choice, [])[before:] = tokens
        triggers = self.plan.stop.ids if self.plan.stop else ()
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
            self._count_steered(
                index, self.prompt_len + min(max(0, count - 1), self.ended.get(index, count))
            )
            for index, count in counts.items()
        )

    def _count_steered(self, choice: int, num_tokens: int) -> int:
        """How many of the first tokens of a prompt and one answer are steered."""
        if not self.plan.matches:
            return count_steered(self.plan, num_tokens)
        tokens = [*self.prompt_tokens, *self.generated.get(choice, ())]
        return count_matched(self.plan, tokens[:num_tokens])

    def to_json(self, choice: int | None = None) -> dict[str, Any]:
        """Returns the receipt for a response's body, with counts for one answer or all."""
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
                | _tokens(term)
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
        } | ({"reads": self._reads(choice)} if self.own_reads else {})

    @property
    def num_scores(self) -> int:
        """How many scores it holds, of all answers."""
        return sum(len(scores.reads) * scores.end for scores in self.scores.values())

    def to_header(self) -> str:
        """Returns the directions and scales for the header, which is sent before any token."""
        parts = [
            f"{quote(self.names[term.digest], safe='/')}:{term.scale:g}" for term in self.plan.terms
        ]
        shown = ", ".join(parts)
        while len(shown) > MAX_HEADER:
            parts.pop()
            shown = ", ".join([*parts, "..."])
        return shown

    def _reads(self, choice: int | None) -> list[dict[str, Any]]:
        """The reads, with the scores of one answer or all."""
        indices = sorted(self.scores) if choice is None else [choice]
        arrays = {
            index: self.scores[index].to_numpy(self.prompt_len + self.answered.get(index, 0))
            for index in indices
            if index in self.scores
        }
        return [
            {
                "name": read.name,
                "layers": list(read.layers),
                "digest": read.digest,
                "when": "after" if read.after else "before",
                "answers": [
                    {"index": index} | self._answer(read, scores[number])
                    for index, scores in arrays.items()
                ],
            }
            for number, read in enumerate(self.plan.reads[: self.own_reads])
        ]

    def _answer(self, read: Read, scores: np.ndarray) -> dict[str, Any]:
        """The scores of one read and answer, from float32 ``[tokens]`` that includes the prompt."""
        parts = {"prompt": scores[: self.prompt_len], "generated": scores[self.prompt_len :]}
        covered = {
            "prompt": any(start < self.prompt_len for start, _ in read.ranges),
            "generated": any(end is None or end > self.prompt_len for _, end in read.ranges),
        }
        answered = parts["generated"][np.isfinite(parts["generated"])]
        summary = {"mean": answered.mean(), "max": answered.max()} if len(answered) else {}
        if summary and read.above is not None:
            summary["share_above"] = (answered > read.above).mean()
        return {part: shown_scores(found) for part, found in parts.items() if covered[part]} | {
            name: round(float(value), _DIGITS) for name, value in summary.items()
        }

    def _strength(self, term: Term) -> dict[str, float]:
        """The strength of a term, if it has one, rounded like the dose."""
        return {"strength": round(self.strengths[term], 6)} if term in self.strengths else {}

    def _form(self, term: Term) -> dict[str, Any]:
        """The form of a term that is not a plain addition."""
        form = term.form
        if form == ADDITION:
            return {}
        found: dict[str, Any] = {"op": form.op}
        if form.partner is not None:
            key = "read" if form.op in READING_OPS else "plane"
            found |= {key: self.names[form.partner], f"{key}_digest": form.partner}
        if form.op in READING_OPS:
            found["bias"] = form.bias
        if form.op == "feature":
            found |= {"threshold": form.threshold, "activation": form.activation}
        if form.gate is not None:
            gate: dict[str, Any] = {"direction": self.names[form.gate], "digest": form.gate}
            gate |= {"above": form.threshold}
            found["gate"] = gate | ({"slope": form.slope} if form.slope else {})
        return found | {"restore_norm": form.restore_norm}


def _tokens(term: Term) -> dict[str, Any]:
    """The tokens that a term acts on, if they decide."""
    match = term.match
    if match is None:
        return {}
    origin = {"origin": match.origin} if match.onward else {}
    return {"from_tokens" if match.onward else "tokens": list(match.tokens)} | origin


def shown_scores(scores: np.ndarray) -> list[float | None]:
    """Scores ``[tokens]`` for JSON: None where there is none."""
    rounded: list[float | None] = np.round(scores.astype(np.float64), _DIGITS).tolist()
    for at in np.flatnonzero(~np.isfinite(scores)).tolist():
        rounded[at] = None
    return rounded
