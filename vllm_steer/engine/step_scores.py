"""Scores of one step: the tokens, readers and layers of its requests' reads.

The reads of a batch become index arrays once, so a step's scores are gathered for all of its requests
together: with many requests, per-request work at every step would cost more than the model itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from vllm_steer.plan.reads import Read, probes_of

# Beyond every position of an answer.
_NEVER = np.iinfo(np.int64).max


@dataclass(frozen=True, eq=False)
class StepScores:
    """The scores of a step's tokens, request by request.

    Attributes:
        request_ids: The requests with reads.
        starts: Absolute position of the first token of each with scores.
        counts: Tokens of each with scores, at consecutive positions; 0 if its reads cover none.
        values: Float32 ``[tokens, reads]``, in order of requests. Values beyond a request's own reads, or at
            positions that a read does not cover, are undefined.
    """

    request_ids: list[str]
    starts: list[int]
    counts: list[int]
    values: np.ndarray


@dataclass(frozen=True, eq=False)
class _Picked:
    """Positions of the scores of a step's T tokens.

    Attributes:
        begins: int ``[R]``, the first token of each request that has scores.
        counts: int ``[R]``, its number of such tokens.
        index: Index into ``[hooked layers, tokens, readers]`` that gives ``[T, reads, layers]``.
        present: bool of that shape, which of these a read has; True where all have as many layers.
        share: Float64 ``[T, reads]``, one over the number of layers of a read.
    """

    begins: np.ndarray
    counts: np.ndarray
    index: tuple[np.ndarray, np.ndarray, np.ndarray]
    present: np.ndarray | Literal[True]
    share: np.ndarray


class ReadBatch:
    """The readers of a batch of R requests, until a request comes or goes.

    Attributes:
        request_ids: The requests.
    """

    def __init__(
        self, request_ids: Sequence[str], reads: Sequence[Sequence[Read]], layers: Sequence[int]
    ) -> None:
        """Makes the index arrays.

        Args:
            request_ids: The requests with reads.
            reads: Reads of each, at least one.
            layers: Hooked layers, in the order of a step's scores.
        """
        self.request_ids = list(request_ids)
        # The first position that any read of a request covers, and the position after the last one.
        self._first = np.array([min(s for r in own for s, _ in r.ranges) for own in reads])
        self._last = np.array([_end_of(own) for own in reads])
        place = {layer: at for at, layer in enumerate(layers)}
        width = max(len(own) for own in reads)
        depth = max(len(read.layers) for own in reads for read in own)
        self._layers = np.zeros((len(reads), width, depth), dtype=np.intp)
        self._slots = np.zeros((len(reads), width, 1), dtype=np.intp)
        self._depths = np.full((len(reads), width), depth)
        for number, own in enumerate(reads):
            probes = probes_of(own)
            for slot, read in enumerate(own):
                places = [place[layer] for layer in read.layers]
                self._layers[number, slot, : len(places)] = places
                self._slots[number, slot] = probes.index(read.probe)
                self._depths[number, slot] = len(places)
        self._picked: _Picked | None = None

    def scores(
        self, found: np.ndarray, positions: np.ndarray, begins: np.ndarray, lengths: np.ndarray
    ) -> StepScores:
        """Gathers the scores of a step.

        Args:
            found: Float32 ``[hooked layers, tokens, readers]``, written by the step's graph.
            positions: int ``[tokens]``, absolute; consecutive within a request.
            begins: int ``[R]``, the first token of each request in the step.
            lengths: int ``[R]``, its number of tokens, at least one.
        """
        at = positions[begins]
        # Most reads cover what is generated alone, and no token of a prompt is picked for them.
        skipped = np.minimum(np.maximum(self._first - at, 0), lengths)
        counts = np.maximum(np.minimum(self._last - at, lengths) - skipped, 0)
        picked = self._pick(begins + skipped, counts)
        values = found[picked.index]
        if values.shape[-1] == 1:
            mean = values[..., 0]
        else:
            total = values.sum(-1, dtype=np.float64, where=picked.present)
            mean = (total * picked.share).astype(np.float32)
        return StepScores(self.request_ids, (at + skipped).tolist(), counts.tolist(), mean)

    def _pick(self, begins: np.ndarray, counts: np.ndarray) -> _Picked:
        """Returns the positions of a step's scores; they stay the same while answers are generated."""
        last = self._picked
        if (
            last is not None
            and np.array_equal(counts, last.counts)
            and np.array_equal(begins, last.begins)
        ):
            return last
        owners = np.repeat(np.arange(len(counts)), counts)
        shift = begins - (np.cumsum(counts) - counts)
        tokens = np.arange(len(owners)) + np.repeat(shift, counts)
        index = self._layers[owners], tokens[:, None, None], self._slots[owners]
        depths = self._depths[owners]
        depth = self._layers.shape[-1]
        present: np.ndarray | Literal[True] = True
        if (self._depths != depth).any():
            present = np.arange(depth) < depths[..., None]
        self._picked = _Picked(begins, counts, index, present, 1 / depths)
        return self._picked


def _end_of(reads: Sequence[Read]) -> int:
    """The position after the last one covered by any of a request's reads."""
    ends = [end for read in reads for _, end in read.ranges]
    return _NEVER if None in ends else max(end for end in ends if end is not None)
