"""The records of a pack's directions, before and after learning."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError

from vllm_steer.errors import ExtractionError, choices
from vllm_steer.offline.extract.data import PackTarget, Scales
from vllm_steer.offline.extract.learning import Learned
from vllm_steer.offline.extract.methods import PLANE_SUFFIX, Method
from vllm_steer.offline.models.prompts import Concept, PrefixRole
from vllm_steer.packs.pack import DirectionRecord, PackName, Prefix, raw_dose

_NAMES = (
    "a direction's name has 1 to 128 characters, none of them / or : or a control character, and no space around it; a "
    "pack's has letters, digits, '_', '.' and '-' alone"
)
# For uncalibrated directions: a raw dose, and degrees from the first axis of a plane.
_DOSE = 0.5
_ANGLE = 60.0


def records_of(
    target: PackTarget,
    concepts: Sequence[Concept],
    layers: list[int],
    method: Method,
    role: PrefixRole = "user",
) -> list[DirectionRecord]:
    """Returns a record without metrics for each concept.

    Args:
        target: The pack; without default scales, they are found with the vectors.
        concepts: The concepts; an empty prefix is none.
        layers: Layers of the directions.
        method: How directions are learned, and act.
        role: Where prefixes stand.

    Raises:
        ExtractionError: Names or scales are invalid in a pack.
    """
    names = [name for name, _ in concepts]
    every = [*names, *(name + PLANE_SUFFIX for name in names if method.plane)]
    if not names:
        raise ExtractionError("no concepts are given; a file of them has one per line")
    if twice := [name for name, times in Counter(every).items() if times > 1]:
        raise ExtractionError(
            f"the names {twice[:5]} are given twice; each direction needs a unique name"
        )
    try:
        TypeAdapter(PackName).validate_python(target.name)
        return [
            DirectionRecord(
                name=name,
                layers=layers,
                default_scale=1.0
                if target.default_scales is None
                else _scale(target.default_scales, name, "default"),
                safe_scale=None
                if target.safe_scales is None
                else _scale(target.safe_scales, name, "safe"),
                positions="all",
                form=method.form_of(name),
                prefix=Prefix(text=prefix, role=role) if prefix.strip() else None,
            )
            for name, prefix in concepts
        ]
    except ValidationError as error:
        raise ExtractionError(
            f"pack {target.name!r} could not be written: {explain(error)}"
        ) from error


def explain(error: ValidationError) -> str:
    """Describes what is wrong with a user's names and scales of directions."""
    # A prefix may be very long.
    return "; ".join(
        f"{fault['input']!r:.80}: {_NAMES if fault['type'] == 'string_pattern_mismatch' else fault['msg']}"
        for fault in error.errors()
    )


def _scale(scales: Scales, name: str, kind: str) -> float:
    if not isinstance(scales, Mapping):
        return float(scales)
    if name not in scales:
        raise ExtractionError(f"concept {name!r} has no {kind} scale; {choices(name, scales)}")
    return float(scales[name])


def learned_records(
    records: Sequence[DirectionRecord],
    learned: Mapping[str, Learned],
    method: Method,
    scaled: bool,
) -> list[DirectionRecord]:
    """Returns the records of the learned directions; a second axis follows its direction.

    Args:
        records: Records of all concepts.
        learned: What was learned, by concept.
        method: How.
        scaled: Whether the records have default scales; else they get an unmeasured one, see
            :func:`unmeasured_scale`.
    """
    found = []
    for record in records:
        if (concept := learned.get(record.name)) is None:
            continue
        update: dict[str, Any] = {"layers": concept.layers, "metrics": concept.metrics}
        if method.one_layer:
            middle = len(concept.residual_norms) // 2
            update["default_layers"] = [min(concept.layers, key=lambda k: abs(k - middle))]
        if not scaled:
            update["default_scale"] = unmeasured_scale(record, concept)
        found.append(record.model_copy(update=update))
        if concept.plane is not None:
            found.append(
                DirectionRecord(
                    name=record.name + PLANE_SUFFIX,
                    layers=concept.layers,
                    default_scale=1.0,
                    positions=record.positions,
                )
            )
    return found


def unmeasured_scale(record: DirectionRecord, concept: Learned) -> float:
    """Returns an initial scale: additions as long, over their layers, as half the residual stream."""
    if record.op == "angle":
        return _ANGLE
    lengths = np.linalg.norm(concept.vectors.astype(np.float64), axis=1).tolist()
    norms = dict(enumerate(concept.residual_norms))
    unit = raw_dose(1.0, dict(zip(concept.layers, lengths, strict=True)), norms)
    return float(f"{_DOSE / unit:.3g}")


def learned_vectors(learned: Mapping[str, Learned]) -> dict[str, NDArray[np.float32]]:
    """Returns the vectors of all records, including second axes."""
    vectors = {name: concept.vectors for name, concept in learned.items()}
    planes = {
        name + PLANE_SUFFIX: concept.plane
        for name, concept in learned.items()
        if concept.plane is not None
    }
    return vectors | planes
