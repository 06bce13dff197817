"""An engine for the benchmarks that needs no model: what it says depends on what steers it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from vllm_steer.offline.bench.ratings import Rated, Rating
from vllm_steer.offline.engine.tokens import Asked, Generated, Sampling
from vllm_steer.packs.pack import SteeringPack

Speak = Callable[[str, list[dict[str, Any]], int | None], str]


class FakeEngine:
    """Answers by a function of the prompt's text, the directions and the seed; its answers have one token a character."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, packs: Sequence[SteeringPack], speak: Speak
    ) -> None:
        self.tokenizer, self.packs, self.speak = tokenizer, list(packs), speak
        self.model = Path("a/model")
        self.asked: list[Asked] = []
        self.scored: list[Asked] = []
        self.sampling: list[Sampling | None] = []

    def generate(
        self, asked: Sequence[Asked], max_tokens: int, name: str, sampling: Sampling | None = None
    ) -> list[Generated]:
        self.asked += asked
        self.sampling.append(sampling)
        said = []
        for one in asked:
            directions = list((one.steering or {}).get("directions", []))
            text = self.speak(str(self.tokenizer.decode(list(one.prompt))), directions, one.seed)
            said.append(Generated(tuple(range(len(text))), text, -1.0, True))
        return said

    def score(self, asked: Sequence[Asked], name: str) -> list[float]:
        """A token costs 1, and 1 more for each direction that steers it."""
        self.scored += asked
        return [
            -float(len(one.answer)) * (1 + len((one.steering or {}).get("directions", [])))
            for one in asked
        ]


class FakeRater:
    """Rates by a function."""

    name = "fake"

    def __init__(self, rate: Callable[[Rated], float | None]) -> None:
        self._rate, self.seen = rate, list[Rated]()

    def rate(self, rated: Sequence[Rated]) -> list[Rating]:
        self.seen += rated
        found = [self._rate(each) for each in rated]
        return [Rating(value, "" if value is not None else "it mumbles") for value in found]
