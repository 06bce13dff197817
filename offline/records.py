"""The records of a pack's directions: before anything is learned, and of what was learned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError

from offline.learning import Learned
from offline.methods import PLANE_SUFFIX, Method
from vllm_steer.errors import ExtractionError, choices
from vllm_steer.pack import DirectionRecord, PackName


def records_of(
    pack_name: str,
    concepts: Sequence[tuple[str, str]],
    layers: list[int],
    default_scales: Mapping[str, float] | float,
    safe_scales: Mapping[str, float] | float,
    method: Method,
) -> list[DirectionRecord]:
    """Returns a record without metrics for each concept.

    Raises:
        ExtractionError: Names or scales cannot be those of a pack.
    """
    names = [name for name, _ in concepts]
    every = [*names, *(name + PLANE_SUFFIX for name in names if method.plane)]
    if not names or len(set(every)) != len(every):
        raise ExtractionError("concepts must be given, each under a name of its own")
    try:
        TypeAdapter(PackName).validate_python(pack_name)
        return [
            DirectionRecord(
                name=name,
                layers=layers,
                default_scale=_scale(default_scales, name, "default"),
                safe_scale=_scale(safe_scales, name, "safe"),
                positions="all",
                form=method.form_of(name),
            )
            for name in names
        ]
    except ValidationError as error:
        faults = "; ".join(f"{fault['input']!r}: {fault['msg']}" for fault in error.errors())
        raise ExtractionError(f"pack {pack_name!r} could not be written: {faults}") from error


def _scale(scales: Mapping[str, float] | float, name: str, kind: str) -> float:
    if not isinstance(scales, Mapping):
        return float(scales)
    if name not in scales:
        raise ExtractionError(f"concept {name!r} has no {kind} scale; {choices(name, scales)}")
    return float(scales[name])


def learned_records(
    records: Sequence[DirectionRecord], learned: Mapping[str, Learned]
) -> list[DirectionRecord]:
    """Returns the records of what was learned; a second axis stands after its direction."""
    found = []
    for record in records:
        if (concept := learned.get(record.name)) is None:
            continue
        found.append(
            record.model_copy(update={"layers": concept.layers, "metrics": concept.metrics})
        )
        if concept.plane is not None:
            found.append(
                DirectionRecord(
                    name=record.name + PLANE_SUFFIX,
                    layers=concept.layers,
                    default_scale=1.0,
                    safe_scale=1.0,
                    positions=record.positions,
                )
            )
    return found


def learned_vectors(learned: Mapping[str, Learned]) -> dict[str, NDArray[np.float32]]:
    """Returns the vectors of all records, those of second axes among them."""
    vectors = {name: concept.vectors for name, concept in learned.items()}
    planes = {
        name + PLANE_SUFFIX: concept.plane
        for name, concept in learned.items()
        if concept.plane is not None
    }
    return vectors | planes
