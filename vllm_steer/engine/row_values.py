"""The terms of a segment -> the values of its row: vectors, and the components of the affine form.

All forms are cases of one change of the residual stream h, at one layer::

    g_k = σ(slope_k (W_k·h − threshold_k)), or 1 where W_k·h > threshold_k and else 0 if slope_k is 0
    c_k = g_k (V_k·h + bias_k + turn_k · ‖(V·h) of k's pair‖)
    change = vector + Σ_k c_k U_k + (Σ_k share_k g_k) diagonal ⊙ h

with components k in pairs (0, 1), (2, 3), …; a plane takes one pair. A direction that multiplies takes a component
for its gate and its factor alone. Pure numpy, no vllm.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from vllm_steer.operations import PLANE_OPS, READING_OPS
from vllm_steer.packs.registry import LoadedDirection
from vllm_steer.plan.capacity import PLANE_RANK
from vllm_steer.plan.dose import MAX_RELATIVE_SCALE
from vllm_steer.plan.row_layout import layout_of, planes_first
from vllm_steer.plan.steering_plan import Segment, Term

BIAS, TURN, THRESHOLD, MOST, SLOPE, SHARE = range(6)
NUMBERS = 6
# Below the zero that an absent probe reads, so that it always fires.
ALWAYS = -1.0
# Limit that an admitted request's reader cannot reach: its result can be squared in float32 for any stream
# within the bounds.
LONGEST_READER = 2.0 * MAX_RELATIVE_SCALE
# Likewise for the factors of dimensions.
LARGEST_FACTOR = 2.0 * MAX_RELATIVE_SCALE


@dataclass(frozen=True, eq=False)
class RowValues:
    """The values of one row of the bank, all float32.

    Attributes:
        vectors: ``[layers, hidden_size]``, added to the stream.
        left: ``[layers, rank, hidden_size]``, U; rank 0 if only additions are compiled.
        readers: ``[layers, 2 * rank, hidden_size]``, V followed by W, the probes.
        numbers: ``[layers, NUMBERS, rank]``: bias, turn, threshold, the limit of c or of the change by the
            diagonal, slope, and the share of the diagonal.
        restore: ``[layers]``, 1 where ‖h‖ is restored, else 0.
        diagonal: ``[layers, hidden_size]``, factors of the dimensions; ``[layers, 0]`` if ``multiply`` is not compiled.
    """

    vectors: np.ndarray
    left: np.ndarray
    readers: np.ndarray
    numbers: np.ndarray
    restore: np.ndarray
    diagonal: np.ndarray

    @classmethod
    def zeros(
        cls, layers: int, rank: int, hidden_size: int, *, multiply: bool = False
    ) -> RowValues:
        """Values that change nothing."""

        def make(*shape: int) -> np.ndarray:
            return np.zeros((layers, *shape), dtype=np.float32)

        numbers = make(NUMBERS, rank)
        numbers[:, MOST] = np.finfo(np.float32).max
        return cls(
            make(hidden_size),
            make(rank, hidden_size),
            make(2 * rank, hidden_size),
            numbers,
            make(),
            make(hidden_size if multiply else 0),
        )

    def within(self, limit: float) -> tuple[RowValues, bool]:
        """Returns finite values that move a stream by at most twice a limit, and whether that cut them.

        Args:
            limit: Largest length of the vector, and of the change by all components together.

        Returns:
            The values, and whether any was changed. The limit of a component is enforced by the graph and
            does not count as a change.
        """
        rank = self.left.shape[1]
        # In float32, where overflow gives infinity, which the comparison also detects.
        fit = bool((_squares(self.vectors) <= limit**2).all())
        if rank:
            fit &= bool((_squares(self.readers) <= LONGEST_READER**2).all())
            fit &= bool(np.isfinite(self.left).all() and np.isfinite(self.numbers).all())
            fit &= bool((np.abs(self.diagonal) <= LARGEST_FACTOR).all())
        found = self if fit else self._cut(limit)
        if rank:
            lengths = np.linalg.norm(found.left.astype(np.float64), axis=-1)
            numbers = found.numbers.copy()
            # The limit of the diagonal is one of a length.
            lengths = np.maximum(lengths, numbers[:, SHARE] > 0)
            most = limit / rank / np.maximum(lengths, np.finfo(np.float32).tiny)
            numbers[:, MOST] = np.minimum(numbers[:, MOST], most)
            found = replace(found, numbers=numbers)
        return found, not fit

    def _cut(self, limit: float) -> RowValues:
        """The values without infinities, and with vectors and readers within their limits."""
        return replace(
            self,
            vectors=_no_longer(self.vectors, limit),
            left=_no_longer(self.left, limit),
            readers=_no_longer(self.readers, LONGEST_READER),
            numbers=np.nan_to_num(self.numbers, nan=0.0),
            diagonal=np.nan_to_num(self.diagonal, nan=0.0).clip(-LARGEST_FACTOR, LARGEST_FACTOR),
        )


def _squares(vectors: np.ndarray) -> np.ndarray:
    """Squared lengths of float32 vectors along the last axis."""
    found: np.ndarray = np.einsum("...h,...h->...", vectors, vectors)
    return found


def _no_longer(vectors: np.ndarray, limit: float) -> np.ndarray:
    """Finite float32 vectors, shortened to a length; NaN becomes 0."""
    exact = np.nan_to_num(vectors, nan=0.0).astype(np.float64)
    lengths = np.linalg.norm(exact, axis=-1, keepdims=True)
    shortened: np.ndarray = exact * (limit / np.maximum(lengths, limit))
    return shortened.astype(np.float32)


def row_values(
    segment: Segment,
    index: Mapping[int, int],
    rank: int,
    hidden_size: int,
    find: Callable[[str], LoadedDirection],
    *,
    multiply: bool = False,
) -> RowValues:
    """Returns the values of a segment's row.

    Args:
        segment: The segment, within ``vllm_steer.plan.capacity``.
        index: Layer to its index in the arrays; other layers are left out.
        rank: Components at each layer.
        hidden_size: Width of the residual stream.
        find: Direction by content digest.
        multiply: Whether op ``multiply`` is compiled.
    """
    values = RowValues.zeros(len(index), rank, hidden_size, multiply=multiply)
    layout = layout_of(segment, rank)
    used = dict.fromkeys(index, 0)
    for number in planes_first(layout.ranks):
        term, own = segment.terms[number], layout.ranks[number]
        here = [layer for layer in term.layers if layer in index]
        places, direction = [index[layer] for layer in here], find(term.digest)
        values.restore[places] = float(term.form.restore_norm)
        added = term.added if term.form.op == "feature" else float(not own) * term.scale
        if added:
            rows = [direction.rows[layer] for layer in here]
            values.vectors[places] += np.float32(added) * direction.vector[rows]
        if not own:
            continue
        for layer in here:
            slot = used[layer] if layout.slots is None else layout.slots[number]
            _enter(values, index[layer], slice(slot, slot + own), term, layer, find)
            used[layer] += own
    return values


def _enter(
    values: RowValues,
    at: int,
    slots: slice,
    term: Term,
    layer: int,
    find: Callable[[str], LoadedDirection],
) -> None:
    """Enters a term's components at one layer."""
    vector, form = find(term.digest).at(layer), term.form
    partner = find(form.partner).at(layer) if form.partner is not None else None
    slot, rank = slots.start, values.left.shape[1]
    numbers, readers = values.numbers[at], values.readers[at]
    numbers[THRESHOLD, slots] = ALWAYS
    if form.gate is not None:
        # Unit vectors, like all readers: half precision holds neither very long nor very short ones.
        probe, length = _unit(find(form.gate).at(layer))
        readers[rank + slot : rank + slots.stop] = probe
        numbers[THRESHOLD, slots] = form.threshold / length
        numbers[SLOPE, slots] = form.slope * length
    if form.op in PLANE_OPS and partner is not None:
        _enter_plane(values, at, slots, _basis(vector, partner), term)
    elif form.op == "multiply":
        values.diagonal[at] += np.float32(term.scale) * vector
        # One component holds the gate and the factor that all of them share.
        numbers[SHARE, slot] = float(not numbers[SHARE].any())
    elif form.op == "add":
        values.left[at, slot] = np.float32(term.scale) * vector
        numbers[BIAS, slot] = 1.0
    elif form.op in READING_OPS and partner is not None:
        # Values that fit half precision, whatever the lengths of the two vectors.
        unit, length = _unit(vector)
        factor = term.gain if form.op == "feature" else term.scale
        values.left[at, slot] = unit
        readers[slot] = factor * length * partner.astype(np.float64)
        numbers[BIAS, slot] = factor * length * form.bias
        if form.op == "feature":
            # Active where r·h + bias > θ; a θ below 0 would leave ReLU.
            probe, length = _unit(partner)
            readers[rank + slot] = probe
            numbers[THRESHOLD, slot] = (form.threshold - form.bias) / length
    else:
        unit, _ = _unit(vector)
        clamp = form.op == "clamp"
        values.left[at, slot] = unit if clamp else -term.scale * unit
        readers[slot] = -unit if clamp else unit
        numbers[BIAS, slot] = term.scale if clamp else 0.0


def _unit(vector: np.ndarray) -> tuple[np.ndarray, float]:
    """The unit vector, float64 ``[hidden_size]``, and the original length."""
    exact = vector.astype(np.float64)
    length = float(np.linalg.norm(exact))
    return exact / length, length


def _enter_plane(values: RowValues, at: int, slots: slice, basis: np.ndarray, term: Term) -> None:
    angle = math.radians(term.scale)
    cos, sin = math.cos(angle), math.sin(angle)
    if term.form.op == "rotate":
        turned = np.array([[cos - 1.0, sin], [-sin, cos - 1.0]])
        values.left[at, slots] = turned @ basis
        values.readers[at, slots] = basis
    else:
        # Replaces the part of h in the plane by one of the same length at the angle.
        values.left[at, slots] = basis
        values.readers[at, slots] = -basis
        values.numbers[at, TURN, slots] = cos, sin


def _basis(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Float64 ``[PLANE_RANK, hidden_size]``: orthonormal, from the first towards the second."""
    a, _ = _unit(first)
    b = second.astype(np.float64)
    for _ in range(PLANE_RANK):
        # Twice, for nearly parallel vectors.
        b = b - (a @ b) * a
        b /= np.linalg.norm(b)
    return np.stack([a, b])
