"""Answers to questions from the real engine, and their perplexity under the unsteered model.

Steering is per request, so one engine answers every concept, scale and subset of layers, and
every prefix, in the same batches.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from vllm_steer.offline.calibrate.measures import surprises
from vllm_steer.offline.engine.tokens import Asked, TokenEngine
from vllm_steer.offline.models.prompts import RenderedPrompt, render_question
from vllm_steer.packs.pack import Prefix, SteeringPack


@dataclass(frozen=True)
class Request:
    """One answer to ask for.

    Attributes:
        question: The user's text.
        direction: ``pack/direction``; None for an unsteered answer.
        scale: ε.
        layers: Layers to steer; None for the direction's default layers.
        prefix: Prefix in addition to the question; None for none.
    """

    question: str
    direction: str | None = None
    scale: float = 0.0
    layers: tuple[int, ...] | None = None
    prefix: Prefix | None = None

    def steering(self) -> dict[str, Any] | None:
        """Returns the request's ``steering`` object."""
        if self.direction is None:
            return None
        chosen: dict[str, Any] = {"name": self.direction, "scale": self.scale}
        if self.layers is not None:
            chosen["layers"] = list(self.layers)
        return {"directions": [chosen]}


@dataclass(frozen=True)
class Answer:
    """An answer of the engine.

    Attributes:
        text: The answer.
        finished: Whether it ended by itself within the token limit.
        perplexity: exp of the mean negative log-probability of its tokens, including the one that ends it,
            under the unsteered model after the same question without prefix; None without tokens.
        tokens: Its token ids.
        log_likelihood: Natural log-likelihood of its tokens, as generated.
    """

    text: str
    finished: bool
    perplexity: float | None
    tokens: tuple[int, ...] = ()
    log_likelihood: float = 0.0


class Generator:
    """Answers questions greedily: chat prompts in, texts out."""

    def __init__(self, engine: TokenEngine, max_tokens: int) -> None:
        """Makes a generator.

        Args:
            engine: The engine, with the packs that requests name.
            max_tokens: Longest answer.
        """
        self.engine, self.max_tokens = engine, max_tokens
        self._packs = {pack.name: pack for pack in engine.packs}
        # Many requests are equal.
        self._rendered = cache(self._render)

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        """Answers all requests, in their order.

        Raises:
            EvaluationError: The engine does not start, dies or refuses a request, or a stored file
                is damaged.
            ExtractionError: A prompt cannot be rendered.
        """
        asked = [
            Asked(self.prompt(r.question, r.prefix).token_ids, steering=self._steering(r))
            for r in requests
        ]
        given = self.engine.generate(asked, self.max_tokens, "answers")
        plain = [self.prompt(request.question).token_ids for request in requests]
        pairs = [(prompt, one.tokens) for prompt, one in zip(plain, given, strict=True)]
        return [
            Answer(
                one.text,
                one.finished,
                math.exp(surprise) if one.tokens else None,
                one.tokens,
                one.log_likelihood,
            )
            for one, surprise in zip(given, surprises(self.engine, pairs, "answers"), strict=True)
        ]

    def prompt(self, question: str, prefix: Prefix | None = None) -> RenderedPrompt:
        """Returns a question as a chat prompt, optionally with a prefix.

        Raises:
            ExtractionError: It cannot be rendered.
        """
        return self._rendered(question, prefix)

    def _steering(self, request: Request) -> dict[str, Any] | None:
        """The steering with explicit layers, so that stored answers stay valid if a pack's default
        changes."""
        steering = request.steering()
        if steering is not None:
            for chosen in steering["directions"]:
                pack, _, name = chosen["name"].partition("/")
                chosen.setdefault("layers", self._packs[pack].directions[name].steered_layers)
        return steering

    def _render(self, question: str, prefix: Prefix | None) -> RenderedPrompt:
        if prefix is None:
            return render_question(self.engine.tokenizer, question)
        return render_question(self.engine.tokenizer, question, prefix.text, prefix.role)


@contextmanager
def generating(
    model: str | os.PathLike[str],
    packs: Sequence[SteeringPack],
    max_tokens: int,
    store: Path | None = None,
    options: Mapping[str, Any] | None = None,
    bar: bool = True,
) -> Iterator[Generator]:
    """A :class:`Generator` whose engine ends with the context; arguments as for both."""
    with TokenEngine(model, packs, options, store, bar) as engine:
        yield Generator(engine, max_tokens)
