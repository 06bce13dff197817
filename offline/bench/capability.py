"""Capability beside steering: how likely neutral text stays, and how many multiple-choice questions are answered rightly."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from vllm_steer.errors import EvaluationError, explain_faults
from vllm_steer.offline.bench.steers import Steer
from vllm_steer.offline.engine.tokens import Asked, TokenEngine
from vllm_steer.offline.files import read_lines

Tokens = tuple[int, ...]


class Item(BaseModel):
    """A multiple-choice question, a line of a file.

    Attributes:
        question: The text before the choice.
        choices: The choices, each of which follows it after a space.
        answer: Number of the right one, from 0.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    question: Annotated[str, Field(pattern=r"\S")]
    choices: Annotated[list[Annotated[str, Field(pattern=r"\S")]], Field(min_length=2)]
    answer: Annotated[int, Field(ge=0)]

    @model_validator(mode="after")
    def _has_the_answer(self) -> Item:
        if self.answer >= len(self.choices):
            raise ValueError(f"answer is {self.answer}, of choices 0 to {len(self.choices) - 1}")
        if len(set(self.choices)) < len(self.choices):
            raise ValueError("choices must be distinct")
        return self


@dataclass(frozen=True)
class CapabilityTexts:
    """What capability is measured on.

    Attributes:
        passages: Neutral texts.
        items: Multiple-choice questions.
    """

    passages: tuple[str, ...] = ()
    items: tuple[Item, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.passages or self.items)


class Capability(BaseModel):
    """Capability at one strength.

    Attributes:
        perplexity: Of the neutral texts, over all of their tokens but each one's first; None where there are none.
        accuracy: Share of the questions whose right choice is the likeliest; None where there are none.
    """

    model_config = ConfigDict(frozen=True)

    perplexity: float | None = None
    accuracy: float | None = None


def read_capability(neutral: Path | None, multiple_choice: Path | None) -> CapabilityTexts:
    """Returns the texts of files: one neutral text a line, and one question a line of JSON.

    Raises:
        EvaluationError: A file cannot be read, is empty, or has a line that is no question; the message says which.
    """
    passages = () if neutral is None else tuple(read_lines(neutral, EvaluationError))
    items = []
    lines = [] if multiple_choice is None else read_lines(multiple_choice, EvaluationError)
    for number, line in enumerate(lines, start=1):
        try:
            items.append(Item.model_validate_json(line))
        except ValidationError as error:
            raise EvaluationError(
                f"{multiple_choice}, text line {number}: must be a JSON object with question, choices and answer: "
                f"{explain_faults(error, 'line')}"
            ) from error
    for file, found in ((neutral, passages), (multiple_choice, items)):
        if file is not None and not found:
            raise EvaluationError(f"{file} is empty; it must have a text in each line")
    return CapabilityTexts(passages, tuple(items))


def capability(
    engine: TokenEngine, texts: CapabilityTexts, steers: Sequence[Steer]
) -> list[Capability]:
    """Returns the capability under each steering, all in the same batches.

    Texts stand for themselves, without chat template, and are steered where a prompt of one token, or of the question,
    and an answer would be.

    Args:
        engine: The engine, with the packs that steerings name.
        texts: What it is measured on.
        steers: The steerings.

    Raises:
        EvaluationError: The engine fails, or a text has fewer than two tokens.
    """
    passages = [_tokens(engine, text) for text in texts.passages]
    for text, tokens in zip(texts.passages, passages, strict=True):
        if len(tokens) < 2:
            raise EvaluationError(f"the neutral text {text[:40]!r} has fewer than two tokens")
    pairs = [(tokens[:1], tokens[1:]) for tokens in passages]
    for item in texts.items:
        pairs += [_split(engine, item.question, choice) for choice in item.choices]
    asked = [
        Asked(start, rest, steer.scoring(len(start))) for steer in steers for start, rest in pairs
    ]
    scores = iter(engine.score(asked, "capability"))
    count = sum(len(tokens) - 1 for tokens in passages)
    found = []
    for _ in steers:
        neutral = sum(next(scores) for _ in passages)
        right = 0
        for item in texts.items:
            by_choice = [next(scores) for _ in item.choices]
            right += int(np.argmax(by_choice)) == item.answer
        found.append(
            Capability(
                perplexity=_exp(-neutral / count) if passages else None,
                accuracy=right / len(texts.items) if texts.items else None,
            )
        )
    return found


def _exp(value: float) -> float:
    """e to a value, and infinity where a float cannot hold it."""
    return math.exp(value) if value < 700 else math.inf


def _tokens(engine: TokenEngine, text: str) -> Tokens:
    return tuple(engine.tokenizer(text)["input_ids"])


def _split(engine: TokenEngine, question: str, choice: str) -> tuple[Tokens, Tokens]:
    """Tokens of a question and of a choice after it, parted where the question alone has other ones."""
    alone, whole = _tokens(engine, question), _tokens(engine, f"{question} {choice}")
    same = 0
    while same < min(len(alone), len(whole) - 1) and alone[same] == whole[same]:
        same += 1
    if not same:
        raise EvaluationError(
            f"the question {question[:40]!r} has no token that stays before {choice[:40]!r}"
        )
    return whole[:same], whole[same:]
