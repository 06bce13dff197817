"""What a benchmark steers by, and the engine's answers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vllm_steer.errors import EvaluationError, choices
from vllm_steer.offline.calibrate.measures import surprises
from vllm_steer.offline.engine.tokens import Asked, Sampling, TokenEngine
from vllm_steer.offline.measures.fluency import repetition
from vllm_steer.offline.models.prompts import render_question
from vllm_steer.packs.pack import DirectionRecord, SteeringPack
from vllm_steer.request.positions import absolute_ranges


@dataclass(frozen=True)
class Part:
    """One direction.

    Attributes:
        name: ``pack/direction``.
        record: Its record.
        scale: ε.
        layers: Layers; None for its own.
    """

    name: str
    record: DirectionRecord
    scale: float
    layers: tuple[int, ...] | None = None

    def chosen(self) -> dict[str, Any]:
        """Returns it as in a request, at its own positions."""
        layers = self.record.steered_layers if self.layers is None else self.layers
        return {"name": self.name, "scale": self.scale, "layers": list(layers)}


@dataclass(frozen=True)
class Steer:
    """Directions that act together; none of them for no steering."""

    parts: tuple[Part, ...] = ()

    def asking(self) -> dict[str, Any] | None:
        """Returns the steering of a request for an answer."""
        if not self.parts:
            return None
        return {"directions": [part.chosen() for part in self.parts]}

    def scoring(self, prompt_len: int) -> dict[str, Any] | None:
        """Returns the steering of a request that scores a given answer after a prompt of a length.

        To the engine the answer is part of the prompt, so that positions are said as they would be were it generated.
        """
        if not self.parts:
            return None
        directions = []
        for part in self.parts:
            ranges = absolute_ranges(part.record.positions, prompt_len)
            directions.append({**part.chosen(), "positions": [list(pair) for pair in ranges]})
        return {"directions": directions}


def direction_of(pack: SteeringPack, name: str) -> DirectionRecord:
    """Returns the record of a direction.

    Raises:
        EvaluationError: The pack has none of this name.
    """
    if name not in pack.directions:
        raise EvaluationError(
            f"pack {pack.name!r} has no direction {name!r}; {choices(name, pack.directions)}"
        )
    return pack.directions[name]


@dataclass(frozen=True)
class Ask:
    """A question to answer.

    Attributes:
        question: What the user says.
        steer: What its answer is steered by.
        seed: Seed of a sampled answer; None for a greedy one.
    """

    question: str
    steer: Steer = Steer()
    seed: int | None = None


@dataclass(frozen=True)
class Said:
    """An answer.

    Attributes:
        text: The answer.
        perplexity: Under the unsteered model; None without tokens.
        repetition: Share of repeated word pairs.
    """

    text: str
    perplexity: float | None
    repetition: float


def answers(
    engine: TokenEngine, asks: Sequence[Ask], max_tokens: int, sampling: Sampling | None
) -> list[Said]:
    """Returns the answer to each question, in order, all in the same batches.

    Raises:
        EvaluationError: The engine fails.
        ExtractionError: A prompt cannot be rendered.
    """
    prompts = [render_question(engine.tokenizer, ask.question).token_ids for ask in asks]
    asked = [
        Asked(prompt, steering=ask.steer.asking(), seed=ask.seed)
        for prompt, ask in zip(prompts, asks, strict=True)
    ]
    given = engine.generate(asked, max_tokens, "answers", sampling)
    pairs = [(prompt, one.tokens) for prompt, one in zip(prompts, given, strict=True)]
    return [
        Said(one.text, math.exp(surprise) if one.tokens else None, repetition(one.text))
        for one, surprise in zip(given, surprises(engine, pairs, "answers"), strict=True)
    ]
