"""The requests for verifying an engine, built from any directions of the packs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vllm_steer.packs.pack import SteeringPack
from vllm_steer.request.schema import REQUEST_KEY

# Requests of the mixed batch, which all run at once; also the limit of a verified engine's steps.
REQUESTS = 16


@dataclass(frozen=True)
class Case:
    """A request.

    Attributes:
        name: Name in messages.
        prompt: Token ids.
        steering: As a client sends it; None for none.
    """

    name: str
    prompt: list[int]
    steering: dict[str, Any] | None

    @property
    def extra(self) -> dict[str, Any] | None:
        """``SamplingParams.extra_args``."""
        return None if self.steering is None else {REQUEST_KEY: self.steering}


@dataclass(frozen=True)
class Directions:
    """Two directions of the packs, or the same one twice if there is only one.

    Attributes:
        first: ``pack/direction``.
        second: Likewise.
        scale: Default scale of the first.
        second_scale: Default scale of the second.
        layers: Layers of the first.
    """

    first: str
    second: str
    scale: float
    second_scale: float
    layers: tuple[int, ...]

    @staticmethod
    def of(packs: Sequence[SteeringPack]) -> Directions:
        """The first direction of the first pack and the last of the last."""
        (one, first), *_ = packs[0].directions.items()
        *_, (other, second) = packs[-1].directions.items()
        return Directions(
            f"{packs[0].name}/{one}",
            f"{packs[-1].name}/{other}",
            first.default_scale,
            second.default_scale,
            tuple(first.layers),
        )

    def steer(self, factor: float = 1.0, **fields: Any) -> dict[str, Any]:
        """Steering by the first direction at a multiple of its default scale, at all positions by default."""
        chosen = {"name": self.first, "scale": factor * self.scale, "positions": "all"}
        return {"directions": [chosen | fields]}

    def other(self) -> dict[str, Any]:
        """Steering by the second direction, or by the first one reversed if there is no second."""
        if self.second == self.first:
            return self.steer(-1.0)
        chosen = {"name": self.second, "scale": self.second_scale, "positions": "all"}
        return {"directions": [chosen]}


def mixed_batch(directions: Directions, prompts: Sequence[list[int]]) -> list[Case]:
    """Returns unsteered and differently steered requests.

    Args:
        directions: The directions.
        prompts: ``REQUESTS`` prompts.
    """
    # A range within the answer changes a request's rows between otherwise equal steps.
    in_answer = len(prompts[REQUESTS - 2]) + 3
    middle = [prompts[11][len(prompts[11]) // 2]]
    both = [
        {"name": directions.first, "scale": directions.scale, "positions": "prompt"},
        {"name": directions.second, "scale": directions.second_scale, "positions": "generated"},
    ]
    steerings: list[tuple[str, dict[str, Any] | None]] = [
        ("unsteered", None),
        ("one direction", directions.steer()),
        ("another scale", directions.steer(1.5)),
        ("unsteered", None),
        ("another direction", directions.other()),
        ("the other way", directions.steer(-1.0)),
        ("prompt", directions.steer(positions="prompt")),
        ("at a token of the prompt", directions.steer(2.0, positions={"tokens": prompts[7][-1:]})),
        ("generated", directions.steer(positions="generated")),
        ("last prompt token", directions.steer(2.0, positions="last_prompt")),
        ("from the prompt's end", directions.steer(positions=[[-4, None]])),
        ("from a token of the prompt on", directions.steer(positions={"from_tokens": middle})),
        ("prompt and answer by different directions", {"directions": both}),
        ("one layer", directions.steer(2.0, layers=[directions.layers[-1]])),
        ("within the answer", directions.steer(2.0, positions=[[in_answer, in_answer + 4]])),
        ("unsteered", None),
    ]
    return [
        Case(f"request {number} ({name})", list(prompt), steering)
        for number, (prompt, (name, steering)) in enumerate(
            zip(prompts, steerings, strict=True), start=1
        )
    ]


@dataclass(frozen=True)
class CachePair:
    """Two requests of one prompt, sent one after the other.

    Attributes:
        name: Name in messages.
        first: Steering of the first; None for none.
        second: Of the second.
        shared: Whether the second may find the first's blocks in the prefix cache.
    """

    name: str
    first: dict[str, Any] | None
    second: dict[str, Any] | None
    shared: bool


def cache_pairs(directions: Directions) -> list[CachePair]:
    """Returns pairs of equal and of different steering."""
    steered, generated = directions.steer(), directions.steer(positions="generated")
    return [
        CachePair("unsteered, then steered", None, steered, False),
        CachePair("steered, then unsteered", steered, None, False),
        CachePair("steered, then at another scale", steered, directions.steer(1.5), False),
        CachePair("steered, then by another direction", steered, directions.other(), False),
        CachePair(
            "steered from the third token on, then throughout",
            directions.steer(positions=[[2, None]]),
            steered,
            False,
        ),
        CachePair("steered twice alike", steered, steered, True),
        CachePair("unsteered twice", None, None, True),
        CachePair("unsteered, then in the answer alone", None, generated, True),
    ]
