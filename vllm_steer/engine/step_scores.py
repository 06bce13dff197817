"""Scores of one step: of its requests, which tokens are read, with which readers, at which layers.

What a batch asks for is turned into index arrays once, so a step's scores are picked for all of its requests
together: with many requests, work for each of them at every step would cost more than the model's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vllm_steer.plan.reads import Read, probes_of

# A position that no answer reaches.
_NEVER = np.iinfo(np.int64).max


@dataclass(frozen=True, eq=False)
class StepScores:
    """The scores of a step's tokens, request by request.

    Attributes:
        request_ids: The requests that read.
        starts: Absolute position of the first token of each that has scores.
        counts: Tokens of each that have scores, at consecutive positions; 0 where its reads cover none.
        values: Float32 ``[tokens, reads]``, those of the first request first. What stands beyond a request's own
            reads, or at positions that a read does not cover, means nothing.
    """

    request_ids: list[str]
    starts: list[int]
    counts: list[int]
    values: np.ndarray


@dataclass(frozen=True, eq=False)
class ReadBatch:
    """The readers of a batch of requests, R of them, until a request comes or goes.

    Attributes:
        request_ids: The requests.
        first: int64 ``[R]``, the first position that any read of a request covers.
        last: int64 ``[R]``, the position after the last one.
        layers: int ``[R, reads, layers]``, places of the layers in a step's scores.
        slots: int ``[R, reads, 1]``, the reader among a token's.
        present: bool ``[R, reads, layers]``, which of these places a read has.
    """

    request_ids: list[str]
    first: np.ndarray
    last: np.ndarray
    layers: np.ndarray
    slots: np.ndarray
    present: np.ndarray

    @classmethod
    def of(
        cls, request_ids: Sequence[str], reads: Sequence[Sequence[Read]], layers: Sequence[int]
    ) -> ReadBatch:
        """Makes the index arrays.

        Args:
            request_ids: The requests that read.
            reads: What each reads, at least one each.
            layers: Hooked layers, in the order of a step's scores.
        """
        place = {layer: at for at, layer in enumerate(layers)}
        width = max(len(own) for own in reads)
        depth = max(len(read.layers) for own in reads for read in own)
        shape = len(reads), width, depth
        batch = cls(
            list(request_ids),
            np.array([min(s for r in own for s, _ in r.ranges) for own in reads], dtype=np.int64),
            np.array([_end_of(own) for own in reads], dtype=np.int64),
            np.zeros(shape, dtype=np.intp),
            np.zeros((len(reads), width, 1), dtype=np.intp),
            np.zeros(shape, dtype=bool),
        )
        # Where a request has fewer reads, a mean of nothing would be an error.
        batch.present[..., 0] = True
        for number, own in enumerate(reads):
            probes = probes_of(own)
            for slot, read in enumerate(own):
                here = slice(len(read.layers))
                batch.layers[number, slot, here] = [place[layer] for layer in read.layers]
                batch.slots[number, slot] = probes.index(read.probe)
                batch.present[number, slot, here] = True
        return batch

    def scores(
        self, found: np.ndarray, positions: np.ndarray, begins: np.ndarray, lengths: np.ndarray
    ) -> StepScores:
        """Picks the scores of a step.

        Args:
            found: Float32 ``[hooked layers, tokens, readers]``, what the step's graph wrote.
            positions: int ``[tokens]``, absolute; consecutive within a request.
            begins: int ``[R]``, the first token of each request in the step.
            lengths: int ``[R]``, its number of tokens, at least one.
        """
        at = positions[begins]
        skipped = np.clip(self.first - at, 0, lengths)
        counts = np.clip(self.last - at, 0, lengths) - skipped
        np.maximum(counts, 0, out=counts)
        owners = np.repeat(np.arange(len(counts)), counts)
        ends = np.cumsum(counts)
        tokens = np.arange(len(owners)) + np.repeat(begins + skipped - (ends - counts), counts)
        picked = found[self.layers[owners], tokens[:, None, None], self.slots[owners]]
        if self.layers.shape[-1] == 1:
            values = picked[..., 0]
        else:
            present = self.present[owners]
            values = picked.mean(-1, dtype=np.float64, where=present).astype(np.float32)
        starts = at + skipped
        return StepScores(self.request_ids, starts.tolist(), counts.tolist(), values)


def _end_of(reads: Sequence[Read]) -> int:
    """The position after the last one that any of a request's reads covers."""
    ends = [end for read in reads for _, end in read.ranges]
    return _NEVER if None in ends else max(end for end in ends if end is not None)
