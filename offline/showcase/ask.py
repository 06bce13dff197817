"""Everyday questions to a server, each three ways: plain, after the concept's prefix, and steered."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from openai import AsyncOpenAI

from vllm_steer.errors import EvaluationError
from vllm_steer.offline.demo.concepts import CONCEPTS
from vllm_steer.offline.models.prompts import SEPARATOR
from vllm_steer.offline.showcase import MODEL
from vllm_steer.packs.pack import DirectionRecord, SteeringPack

# The length of the answers in calibration.
MAX_TOKENS = 48
_BIOGRAPHY = "If someone wrote your biography, how would it begin?"
QUESTIONS: Mapping[str | None, str] = {
    "fears": "How are you holding up today?",
    "moods": "How are you holding up today?",
    "experts": _BIOGRAPHY,
    "personas": _BIOGRAPHY,
    "places": "What is the air like where you are?",
    None: _BIOGRAPHY,
}
"""What each class is asked; None is asked of a direction without a class.

Everyday questions that are held out, on which nothing was learned or tuned, and which let a concept of that
class show. They were chosen by what they ask, before any answer to them was read.
"""


@dataclass(frozen=True)
class Asked:
    """A question and the direction that it is asked with.

    Attributes:
        direction: ``pack/direction``.
        record: The direction's record.
        question: The question.
    """

    direction: str
    record: DirectionRecord
    question: str

    @property
    def prefix(self) -> str:
        """What makes the model take on the concept without steering."""
        assert self.record.prefix is not None
        return self.record.prefix.text

    @property
    def prefixed(self) -> str:
        """The question after the prefix."""
        return f"{self.prefix}{SEPARATOR}{self.question}"

    @property
    def steering(self) -> dict[str, Any]:
        """The steering of the request."""
        return {"directions": [{"name": self.direction, "strength": 1.0}]}


@dataclass(frozen=True)
class Example:
    """The answers to a question.

    Attributes:
        asked: What was asked.
        plain: The model's answer to the question alone.
        prefixed: Its answer to the question after the prefix.
        steered: Its answer to the question alone, steered.
        receipt: The server's receipt of the steered request.
    """

    asked: Asked
    plain: str
    prefixed: str
    steered: str
    receipt: Mapping[str, Any]


def chosen(packs: Sequence[SteeringPack], per_class: int) -> list[Asked]:
    """Returns the concepts of every class that steer best, and all directions that belong to none.

    Best is what the calibration measured: of the directions that it found to steer, those whose own
    answers the prefix makes likeliest. Their question is that of :data:`QUESTIONS`.

    Args:
        packs: The packs.
        per_class: Concepts of each class.
    """
    known = {concept for table in CONCEPTS.values() for concept in table}
    there = [
        (f"{pack.name}/{name}", record)
        for pack in packs
        for name, record in pack.directions.items()
        if record.prefix is not None
    ]
    best = {
        name
        for table in CONCEPTS.values()
        for name, _ in sorted(
            ((name, record) for name, record in there if record.name in table),
            key=lambda one: _expression(one[1]),
            reverse=True,
        )[:per_class]
    }
    shown = [(name, record) for name, record in there if name in best or record.name not in known]
    return [Asked(name, record, _question(record.name)) for name, record in shown]


def _question(concept: str) -> str:
    owner = next((each for each, table in CONCEPTS.items() if concept in table), None)
    return QUESTIONS[owner]


def _expression(record: DirectionRecord) -> tuple[bool, float]:
    """Whether a direction was found to steer, and how clearly its answers express the concept."""
    found = record.calibration
    if found is None or found.expression is None:
        return False, -math.inf
    return found.steers, found.expression


def ask_all(url: str, asked: Sequence[Asked]) -> list[Example]:
    """Asks a server everything at once.

    Args:
        url: Base URL of its API, ending in ``/v1``.
        asked: What is asked.

    Raises:
        EvaluationError: A steered answer came without its receipt.
    """
    return asyncio.run(_ask_all(url, asked))


async def _ask_all(url: str, asked: Sequence[Asked]) -> list[Example]:
    async with AsyncOpenAI(base_url=url, api_key="none", timeout=600) as client:
        plain = [_ask(client, one.question) for one in asked]
        prefixed = [_ask(client, one.prefixed) for one in asked]
        steered = [_ask(client, one.question, one.steering) for one in asked]
        answers = await asyncio.gather(*plain, *prefixed, *steered)
    count = len(asked)
    ways = zip(asked, answers, answers[count:], answers[2 * count :], strict=False)
    return [
        Example(one, plain[0], prefixed[0], steered[0], _receipt(steered[1]))
        for one, plain, prefixed, steered in ways
    ]


async def _ask(
    client: AsyncOpenAI, text: str, steering: Mapping[str, Any] | None = None
) -> tuple[str, Any]:
    """Returns the answer as one line, and its receipt where it was steered."""
    response = await client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": text}],
        max_tokens=MAX_TOKENS,
        temperature=0.0,
        extra_body={"steering": steering} if steering else {},
    )
    choice = response.choices[0]
    answer = " ".join((choice.message.content or "").split())
    cut = " …" if choice.finish_reason == "length" else ""
    return answer + cut, (response.model_extra or {}).get("steering")


def _receipt(receipt: Any) -> Mapping[str, Any]:
    # One for each prompt of the request.
    if isinstance(receipt, list) and len(receipt) == 1:
        receipt = receipt[0]
    if not isinstance(receipt, dict):
        raise EvaluationError("the server answered a steered request without a receipt of it")
    return receipt
