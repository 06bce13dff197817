"""The arms that every benchmark compares, and the work that all of them get.

An arm is an engine and the steering of each request of a batch. Engines differ in what is
installed; the arms of one engine differ in what requests ask for alone.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.models import PACK_NAME
from vllm_steer.verify.engine_calls import ExtraArgs

PLAIN = "plain"
CONTROL = "control"
PLUGIN = "plugin"
AFFINE = "affine"
READS = "reads"
MULTIPLY = "multiply"
TOKENS = "tokens"
# Probes of each request that reads, and the layers of each where it is not one.
PROBES = 4
READ_LAYERS = 8
DIRECTIONS = 8
# Directions that one request of the distinct arm combines.
COMBINED = 3
STRONG = 50.0
WORKLOADS = ("decode-heavy", "prefill-heavy")

# Number of requests and a source of randomness to the extra arguments of each request.
Steering = Callable[[int, random.Random], list[ExtraArgs]]


@dataclass(frozen=True)
class Workload:
    """A batch of requests, all sent at once.

    Attributes:
        name: Name in reports.
        requests: Number of requests; all run at the same time.
        prompt: Tokens of each prompt.
        answer: Tokens generated for each.
    """

    name: str
    requests: int
    prompt: int
    answer: int

    def prompts(self, vocabulary: int, rng: random.Random) -> list[list[int]]:
        """New random prompts, so that no prefix cache has seen them."""
        return [
            [rng.randrange(3, vocabulary) for _ in range(self.prompt)] for _ in range(self.requests)
        ]


@dataclass(frozen=True)
class Arm:
    """One way to serve a workload.

    Attributes:
        name: Name in reports; of the ratios but for plain vLLM.
        engine: Name of the engine.
        steering: What the requests ask for.
    """

    name: str
    engine: str
    steering: Steering


def unsteered(count: int, rng: random.Random) -> list[ExtraArgs]:
    """No request is steered."""
    return [None] * count


def steered_one(count: int, rng: random.Random) -> list[ExtraArgs]:
    """Every request by the same direction at all layers."""
    return [_ask([(0, 1.0)])] * count


def steered_half(count: int, rng: random.Random) -> list[ExtraArgs]:
    """Every other request, by one of the directions."""
    return [_ask([(index % DIRECTIONS, 1.0)]) if index % 2 else None for index in range(count)]


def steered_distinct(count: int, rng: random.Random) -> list[ExtraArgs]:
    """Every request by a combination of its own, at scales that no request had before.

    So each row of the bank is summed and uploaded within the time that is measured.
    """
    return [
        _ask([(d, rng.uniform(0.5, 1.5)) for d in rng.sample(range(DIRECTIONS), COMBINED)])
        for _ in range(count)
    ]


def rotated_distinct(count: int, rng: random.Random) -> list[ExtraArgs]:
    """Every request by a rotation of rank 2 at all layers, by an angle that no request had before."""
    asked = []
    for _ in range(count):
        one, other = rng.sample(range(DIRECTIONS), 2)
        extra = _ask([(one, rng.uniform(1.0, 20.0))])
        extra["steering"]["directions"][0] |= {"op": "rotate", "plane": f"{PACK_NAME}/d{other}"}
        asked.append(extra)
    return asked


def gated_softly(count: int, rng: random.Random) -> list[ExtraArgs]:
    """Every request by an addition behind a soft gate at all layers, at a scale that no request had before."""
    asked = []
    for extra in multiplied_distinct(count, rng):
        chosen = extra["steering"]["directions"][0] | {"op": "add"}
        chosen["gate"] = {"direction": f"{PACK_NAME}/d0", "above": 0.0, "slope": 1.0}
        asked.append({"steering": extra["steering"] | {"directions": [chosen]}})
    return asked


def multiplied_distinct(count: int, rng: random.Random) -> list[dict[str, Any]]:
    """Every request multiplied by a direction at all layers, at a scale that no request had before."""
    asked = []
    for _ in range(count):
        extra = _ask([(rng.randrange(DIRECTIONS), rng.uniform(0.1, 0.5))])
        extra["steering"]["directions"][0] |= {"op": "multiply"}
        asked.append(extra)
    return asked


def at_tokens(count: int, rng: random.Random) -> list[ExtraArgs]:
    """Every request by a combination of its own, at the tokens with one of eight ids."""
    asked = []
    for extra in steered_distinct(count, rng):
        assert extra is not None
        ids = sorted(rng.sample(range(3, 100), 8))
        asked.append({"steering": extra["steering"] | {"positions": {"tokens": ids}}})
    return asked


def reading(layers: int) -> Steering:
    """Every request reads :data:`PROBES` directions of each generated token, at the first layers."""

    def steering(count: int, rng: random.Random) -> list[ExtraArgs]:
        reads = [
            {"name": f"{PACK_NAME}/d{d}", "layers": list(range(layers)), "at": "generated"}
            for d in range(PROBES)
        ]
        return [{"steering": {"read": reads}}] * count

    return steering


def strongly_steered(count: int, rng: random.Random) -> list[ExtraArgs]:
    """By a vector that no answer can ignore, to see that steering happens at all."""
    return [_ask([(0, STRONG)])] * count


PLUGIN_ARMS = (
    Arm("idle", PLUGIN, unsteered),
    Arm("steered_half", PLUGIN, steered_half),
    Arm("steered_one", PLUGIN, steered_one),
    Arm("steered_distinct", PLUGIN, steered_distinct),
)


@dataclass(frozen=True)
class Variant:
    """A second plugin, started another way.

    Attributes:
        steering: Its settings beside the packs.
        arms: Its arms.
    """

    steering: dict[str, Any]
    arms: tuple[Arm, ...]


VARIANTS = (AFFINE, READS, MULTIPLY, TOKENS)


def variant(name: str, layers: int) -> Variant:
    """Returns one of :data:`VARIANTS` for a model of ``layers`` layers."""
    if name == AFFINE:
        affine = (
            Arm("affine_idle", AFFINE, unsteered),
            Arm("affine_add_distinct", AFFINE, steered_distinct),
            Arm("affine_rank2_distinct", AFFINE, rotated_distinct),
            Arm("affine_soft_gate_distinct", AFFINE, gated_softly),
        )
        return Variant({"ops": "affine"}, affine)
    if name == MULTIPLY:
        multiply = (
            Arm("multiply_idle", MULTIPLY, unsteered),
            Arm("multiply_add_distinct", MULTIPLY, steered_distinct),
            Arm("multiply_distinct", MULTIPLY, multiplied_distinct),
        )
        return Variant({"ops": "affine", "multiply": True}, multiply)
    if name == TOKENS:
        # The engine is that of the other arms, and only what requests name differs.
        return Variant({}, (Arm("tokens_distinct", TOKENS, at_tokens),))
    reads = (
        Arm("reads_idle", READS, unsteered),
        Arm("reads_add_distinct", READS, steered_distinct),
        Arm("reads_one_layer", READS, reading(1)),
        Arm("reads_eight_layers", READS, reading(min(READ_LAYERS, layers))),
    )
    return Variant({"reads": PROBES}, reads)


def workloads(requests: int, scale: float = 1.0) -> tuple[Workload, Workload]:
    """A decode-heavy and a prefill-heavy workload; the first is the main one.

    Args:
        requests: Requests of each.
        scale: Factor of the tokens of each.
    """
    return (
        Workload(WORKLOADS[0], requests, 16, max(2, round(128 * scale))),
        Workload(WORKLOADS[1], requests, max(16, round(256 * scale)), 4),
    )


def _ask(terms: Sequence[tuple[int, float]]) -> dict[str, Any]:
    directions = [{"name": f"{PACK_NAME}/d{d}", "scale": scale} for d, scale in terms]
    return {"steering": {"directions": directions, "positions": "all"}}
