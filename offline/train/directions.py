"""What is served of a trained form: directions of a pack, whose sum is the form."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from pydantic import JsonValue

from vllm_steer.packs.pack import DirectionRecord, FormChoice, SteeringPack
from vllm_steer.request.positions import AnyPositions

Floats = NDArray[np.float32]
BIAS, READ, FACTORS = "bias", "read", "factors"
"""Words after the name of a form: what is added, what a component reads, and what dimensions are scaled by."""


@dataclass(frozen=True, eq=False)
class Direction:
    """A direction of a pack that is to be written.

    Attributes:
        name: Its name.
        layers: Layers of the rows, ascending.
        vectors: ``[layers, hidden_size]``, float32.
        form: How it acts; None for addition.
        scale: Default scale.
        metrics: Figures for people to read.
    """

    name: str
    layers: Sequence[int]
    vectors: Floats
    form: FormChoice | None = None
    scale: float = 1.0
    metrics: Mapping[str, JsonValue] = field(default_factory=dict)

    def record(self, positions: AnyPositions) -> DirectionRecord:
        """Returns its record, at positions that it acts at where a request names none.

        Raises:
            ValidationError: A name or number cannot be that of a pack.
        """
        return DirectionRecord(
            name=self.name,
            layers=list(self.layers),
            default_scale=self.scale,
            positions=positions,
            form=self.form,
            metrics=dict(self.metrics),
        )


@dataclass(frozen=True)
class Target:
    """The pack that is written.

    Attributes:
        name: Its name.
        path: Its directory.
    """

    name: str
    path: str | os.PathLike[str]


def low_rank_directions(
    name: str, layers: Sequence[int], projection: Floats, weight: Floats, bias: Floats
) -> list[Direction]:
    """Returns h + Rᵀ(W·h + b − R·h) as directions, which a request names together.

    Component k writes the row k of R and reads that of W − R; what does not depend on h is one addition. None of them
    has the name alone, so that a request for a part of the form is refused.

    Args:
        name: Name of the form.
        layers: Layers, ascending.
        projection: R, ``[layers, rank, hidden_size]``.
        weight: W, ``[layers, rank, hidden_size]``.
        bias: b, ``[layers, rank]``.
    """
    added = np.einsum("lr,lrh->lh", bias.astype(np.float64), projection.astype(np.float64))
    kept = np.flatnonzero(added.any(axis=1))
    found = []
    if len(kept):
        at = [layers[place] for place in kept]
        found.append(Direction(f"{name} {BIAS}", at, added[kept].astype(np.float32)))
    readers = (weight.astype(np.float64) - projection).astype(np.float32)
    for k in range(projection.shape[1]):
        own = f"{name} {k + 1}"
        form = FormChoice(op="affine", read=f"{own} {READ}")
        found.append(Direction(own, layers, projection[:, k], form))
    for k in range(projection.shape[1]):
        found.append(Direction(f"{name} {k + 1} {READ}", layers, readers[:, k]))
    return found


def scaled_directions(
    name: str, layers: Sequence[int], factors: Floats, bias: Floats
) -> list[Direction]:
    """Returns h ⊙ (1 + m) + a as directions, which a request names together.

    None of them has the name alone, so that a request for a part of the form is refused.

    Args:
        name: Name of the form.
        layers: Layers, ascending.
        factors: m, ``[layers, hidden_size]``.
        bias: a, ``[layers, hidden_size]``.
    """
    parts = ((BIAS, bias, None), (FACTORS, factors, FormChoice(op="multiply")))
    found = []
    for part, vectors, form in parts:
        # A pack holds no zeros.
        kept = np.flatnonzero(vectors.any(axis=1))
        if len(kept):
            at = [layers[place] for place in kept]
            found.append(Direction(f"{name} {part}", at, vectors[kept], form))
    return found


def together(pack: SteeringPack) -> list[list[str]]:
    """Returns the names of the pack's forms of several directions, for each those that a request gives together."""
    forms: dict[str, list[str]] = {}
    for name, record in pack.directions.items():
        whole, _, part = name.rpartition(" ")
        reads = record.form is not None and record.form.read == f"{name} {READ}"
        others = {f"{whole} 1", f"{whole} {FACTORS}"} & pack.directions.keys()
        scales = part == FACTORS and record.op == "multiply"
        if reads or scales or (part == BIAS and others):
            forms.setdefault(whole, []).append(name)
    return list(forms.values())
