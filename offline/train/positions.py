"""Positions that a trained form acts at, as a mask of a padded batch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_steer.errors import ExtractionError
from vllm_steer.request.positions import AnyPositions, PromptRanges, parse_positions

NAMES = ("all", "prompt", "generated", "last_prompt")
_ENDS = re.compile(r"(?:f(?P<first>[1-9][0-9]{0,3}))?(?:(?:^|\+)l(?P<last>[1-9][0-9]{0,3}))?")
_WANTED = (
    "must be all, prompt, generated, last_prompt, or ends of the prompt such as f2+l2, f4 or l1"
)


@dataclass(frozen=True)
class Positions:
    """Where a form acts.

    Attributes:
        name: ``all``, ``prompt``, ``generated`` or ``last_prompt``; ``ends`` for the ends of the prompt.
        first: ``ends``: so many first tokens of the prompt.
        last: ``ends``: so many last ones.
        skipped: ``all``: tokens at the beginning where nothing acts, such as those of the template.
    """

    name: str
    first: int = 0
    last: int = 0
    skipped: int = 0

    @classmethod
    def parse(cls, text: str, skipped: int = 0) -> Positions:
        """Reads a name, or ends as pyreft writes them.

        Raises:
            ExtractionError: It is neither.
        """
        if text in NAMES:
            return cls(text, skipped=skipped if text == "all" else 0)
        found = _ENDS.fullmatch(text)
        if not text or found is None:
            raise ExtractionError(f"positions {text!r} {_WANTED}")
        return cls("ends", int(found["first"] or 0), int(found["last"] or 0), skipped)

    def served(self) -> AnyPositions:
        """Returns the same positions as a pack and a request give them."""
        if self.name == "all" and self.skipped:
            return ((self.skipped, None),)
        if self.name == "ends":
            ends = ((0, self.first), (-self.last, None))
            return PromptRanges(tuple(pair for pair in ends if pair[0] or pair[1]))
        return parse_positions(self.name)

    def mask(
        self, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]
    ) -> Tensor | None:
        """Returns where the form acts, ``[rows, length]``, bool, never on padding; None for everywhere.

        Args:
            prompts: Token ids of each prompt.
            answers: Token ids of each answer.
        """
        if self.name == "all" and not self.skipped:
            return None
        starts = torch.tensor([[len(prompt)] for prompt in prompts])
        ends = starts + torch.tensor([[len(answer)] for answer in answers])
        at = torch.arange(int(ends.max()))[None]
        acting = {
            "all": at < ends,
            "prompt": at < starts,
            "generated": (at >= starts) & (at < ends),
            "last_prompt": at == starts - 1,
            "ends": (at < starts) & ((at < self.first) | (at >= starts - self.last)),
        }[self.name]
        return acting & (at >= self.skipped) if self.name == "all" else acting
