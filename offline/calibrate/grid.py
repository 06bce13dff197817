"""The search grid of a calibration: windows of layers, and scales that are comparable between models.

Scales of additions are given as raw doses, the sum over layers of the vector's length divided by that of the
residual stream, so one grid serves vectors of any length on streams of any length.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vllm_steer.errors import EvaluationError
from vllm_steer.packs.pack import DirectionRecord, SteeringPack, raw_dose

# From a barely noticeable change to one that breaks the text.
DOSES = (0.1, 0.2, 0.4, 0.8, 1.6)
# Around the best of these. Expressing a concept takes more strength than making it likely.
FINER = (0.75, 1.0, 1.2, 1.5)
# Degrees from the first axis: the unsteered residual stream is at about a right angle.
_RIGHT = 90.0
ANGLES = (80.0, 70.0, 60.0, 50.0, 40.0, 30.0)
TURNS = (5.0, 10.0, 20.0, 30.0, 45.0, 60.0)
# Relative depths of the single layers to try.
_DEPTHS = (0.25, 0.4, 0.55, 0.7, 0.8, 0.9)
# Directions with at most this many layers keep them.
_FEW = 3


@dataclass(frozen=True)
class Subject:
    """A direction to calibrate.

    Attributes:
        name: ``pack/direction``.
        record: Its record.
        lengths: Length that a scale of 1 adds at most, by layer: the vector's, or of a stream that it multiplies.
        norms: Norm of the residual stream by layer.
        joint: Whether its layers were learned together and must be used together.
    """

    name: str
    record: DirectionRecord
    lengths: Mapping[int, float]
    norms: Mapping[int, float]
    joint: bool

    def windows(self, blocks: int) -> list[tuple[int, ...]]:
        """Returns the sets of layers to try, the direction's own first.

        Args:
            blocks: Number of the model's blocks.
        """
        own = tuple(self.record.layers)
        if self.joint or len(own) <= _FEW:
            return [own]
        middle = tuple(k for k in own if blocks // 4 <= k < blocks * 3 // 4)
        single = [(min(own, key=lambda k: abs(k - depth * blocks)),) for depth in _DEPTHS]
        found = [own, *([middle] if middle else []), *single]
        return list(dict.fromkeys(found))

    def dose(self, scale: float, layers: tuple[int, ...]) -> float:
        """Returns the raw dose of an addition of ``scale`` at these layers."""
        return raw_dose(scale, {k: self.lengths[k] for k in layers}, self.norms)

    def scales(self, layers: tuple[int, ...]) -> list[float]:
        """Returns the scales to try first, from the weakest."""
        op = self.record.op
        if op == "ablate" or self.joint:
            # Trained vectors already have the right length.
            return [1.0]
        if op == "angle":
            return list(ANGLES)
        if op == "rotate":
            return list(TURNS)
        if op == "clamp":
            typical = float(np.mean([self.norms[k] for k in layers]))
            return [rounded(share * typical / len(layers)) for share in DOSES]
        return [rounded(dose / self.dose(1.0, layers)) for dose in DOSES]

    def half(self, scale: float) -> float:
        """Returns the scale of half the strength; of an angle, halfway from the unsteered stream."""
        return rounded((_RIGHT + scale) / 2 if self.record.op == "angle" else scale / 2)

    def finer(self, best: float, tried: list[float]) -> list[float]:
        """Returns the scales around the best of those tried, including it, from the weakest."""
        op = self.record.op
        if op == "ablate":
            return tried
        if op in ("angle", "rotate"):
            at = tried.index(best)
            return tried[max(0, at - 2) : at + 3]
        return [rounded(best * factor) for factor in FINER]


def subjects(pack: SteeringPack) -> list[Subject]:
    """Returns the directions of a pack to calibrate: those not named by another's form.

    Raises:
        EvaluationError: The scale of one is a factor of an activation, for which there is no grid.
    """
    for name, record in pack.directions.items():
        if record.form is not None and record.form.activation == "multiply":
            raise EvaluationError(
                f"direction {name!r} multiplies an activation, which has no strength to calibrate; let its form set it"
            )
    partners = {
        name
        for record in pack.directions.values()
        if record.form is not None
        for name in record.form.partners().values()
    }
    return [subject(pack, name) for name in pack.directions if name not in partners]


def subject(pack: SteeringPack, name: str) -> Subject:
    """Returns one direction of a pack."""
    record = pack.directions[name]
    norms = {int(layer): norm for layer, norm in pack.manifest.residual_norms.items()}
    lengths = _lengths(record, pack.vectors[name], norms)
    joint = pack.manifest.method.settings.get("estimator") == "trained"
    return Subject(f"{pack.name}/{name}", record, lengths, norms, joint)


def rounded(value: float) -> float:
    """Returns a number rounded to three significant digits."""
    return float(f"{value:.3g}")


def _lengths(
    record: DirectionRecord, vector: NDArray[np.float32], norms: Mapping[int, float]
) -> dict[int, float]:
    if record.op == "multiply":
        largest = dict(zip(record.layers, np.abs(vector).max(axis=1).tolist(), strict=True))
        return {layer: norms[layer] * size for layer, size in largest.items()}
    lengths = np.linalg.norm(vector.astype(np.float64), axis=1).tolist()
    return dict(zip(record.layers, lengths, strict=True))
