"""The context of one HTTP request while vLLM handles it.

The middleware creates a context, admission adds receipts, and the middleware puts them into the response.
vLLM passes neither headers nor response to the code in between, so the context is a context variable, which
tasks that vLLM starts for the request inherit.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from vllm_steer.request.schema import SteeringRequest
from vllm_steer.serving.receipt import Receipt


@dataclass(eq=False)
class HttpContext:
    """One HTTP request on a steered route.

    Attributes:
        route: Its path.
        key_digest: SHA-256 of its API key in hexadecimal, None without one.
        model: The model's name in the request, None if it is not an alias.
        alias: Steering of the alias.
        patient: Whether its prompts wait for rows without a time limit, since nobody would retry.
        ended: Whether it was answered; background work keeps its own references.
        let_in: Whether one of its prompts got its rows.
        busy: Why one of its prompts got no rows; None unless its wait timed out.
        receipts: One for each steered prompt, in the order of the prompts.
        ranges: Ranges of positions of its prompts, without the first of each.
        prompt_scores: How many scores of its prompts' tokens its answers will have.
        asked: The extra arguments parsed last, and their steering: all prompts of a body share it.
    """

    route: str
    key_digest: str | None = None
    model: str | None = None
    alias: SteeringRequest | None = None
    patient: bool = False
    ended: bool = False
    let_in: bool = False
    busy: str | None = None
    receipts: list[Receipt] = field(default_factory=list)
    ranges: int = 0
    prompt_scores: int = 0
    asked: tuple[Mapping[str, Any], SteeringRequest | None] | None = None

    @property
    def shown_receipts(self) -> list[Receipt]:
        """The receipts in the response: all, or none if only the operator reads."""
        return [] if all(receipt.silent for receipt in self.receipts) else self.receipts

    def receipt_of(self, index: int) -> tuple[Receipt, int] | None:
        """Returns the receipt of the answer with an index, and its index among its prompt's.

        Args:
            index: ``choices[].index`` of the response, which counts over all prompts.
        """
        for receipt in self.receipts:
            if index < receipt.num_choices:
                return receipt, index
            index -= receipt.num_choices
        return None


current_http_context: ContextVar[HttpContext | None] = ContextVar(
    "current_http_context", default=None
)
