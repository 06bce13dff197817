"""The context of one HTTP request while vLLM handles it.

The middleware makes a context, admission writes receipts into it, and the middleware
puts them into the response. vLLM hands neither the headers nor the response to the code between,
so it travels in a context variable; tasks that vLLM starts for the request inherit it.
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
        model: The model's name as the client gave it, None when it stands for no steering.
        alias: Steering that the model's name stands for.
        patient: Whether its prompts wait for rows for as long as it takes, since nobody would ask again.
        ended: Whether it was answered; what goes on in the background holds what it needs by itself.
        let_in: Whether a prompt of it got its rows.
        busy: Why a prompt of it did not; None unless its wait ended.
        receipts: One for each steered prompt, in the order of the prompts.
        prompt_scores: How many scores of its prompts' tokens its answers will have.
        asked: Further arguments that were read last, and the steering in them: all prompts of a body share it.
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
    prompt_scores: int = 0
    asked: tuple[Mapping[str, Any], SteeringRequest | None] | None = None

    @property
    def shown_receipts(self) -> list[Receipt]:
        """The receipts that the response has: all, or none where the operator alone reads."""
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
