"""Scores as sent to the front end, and as returned, by absolute position.

Importing this module imports neither torch nor vllm.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import msgspec
import numpy as np

from vllm_steer.plan.reads import Read, StopRule

# The key in ``EngineCoreOutput.kv_transfer_params``, the only field of vLLM's outputs that takes any value;
# the front end removes it before vLLM reads the field.
CARRIER = "_vllm_steer_scores"
# Attribute of a vLLM ``CompletionOutput`` with its scores.
SCORES_ATTRIBUTE = "steering_scores"


class _Message(msgspec.Struct, frozen=True, array_like=True):
    """Scores of several requests; ``places`` is the id of each, its first position and its number of tokens."""

    places: list[tuple[str, int, int]]
    reads: int
    scores: bytes


# Chunks that are kept as they came.
_FRESH = 256
_DECODER = msgspec.msgpack.Decoder(_Message)


def pack_scores(taken: Sequence[tuple[str, int, np.ndarray]]) -> bytes:
    """Returns the message of some scores.

    Args:
        taken: For each request its id, the first position, and float32 ``[tokens, reads]`` from there on;
            requests with fewer reads than others have unused columns at the end.
    """
    width = max(scores.shape[1] for _, _, scores in taken)
    rows = [
        scores
        if scores.shape[1] == width
        else np.pad(scores, ((0, 0), (0, width - scores.shape[1])))
        for _, _, scores in taken
    ]
    places = [(name, start, len(scores)) for name, start, scores in taken]
    found = np.concatenate(rows).astype("<f4", copy=False)
    return msgspec.msgpack.encode(_Message(places, width, found.tobytes()))


def unpack_scores(message: bytes) -> Iterator[tuple[str, int, np.ndarray]]:
    """Inverse of :func:`pack_scores`."""
    found = _DECODER.decode(message)
    scores = np.frombuffer(found.scores, dtype="<f4").reshape(-1, found.reads)
    at = 0
    for request_id, start, count in found.places:
        yield request_id, start, scores[at : at + count]
        at += count


class Scores:
    """The scores of one answer and its prompt.

    A token has a score if a read covers it and the model read it for this request: not the last token of an
    answer, nor prompt tokens found in the prefix cache.

    Attributes:
        reads: The reads.
        prompt_len: Tokens of the prompt.
        rules: Rules by which reads end the answer.
        end: Position after the last score received.
    """

    def __init__(
        self, reads: tuple[Read, ...], prompt_len: int, rules: tuple[StopRule, ...] = ()
    ) -> None:
        """Makes an object without scores."""
        self.reads, self.prompt_len, self.rules = reads, prompt_len, rules
        self.end = 0
        # First position and scores, float32 ``[tokens, reads or more]``, in order of position.
        self._chunks: list[tuple[int, np.ndarray]] = []
        self._fresh = 0

    @property
    def names(self) -> tuple[str, ...]:
        """``pack/direction`` of each read."""
        return tuple(read.name for read in self.reads)

    def add(self, start: int, scores: np.ndarray) -> None:
        """Adds scores, in order of position.

        Args:
            start: First position, not before :attr:`end`.
            scores: Float32 ``[tokens, reads or more]``.
        """
        self._chunks.append((start, scores))
        self.end = start + len(scores)
        self._fresh += 1
        # Most chunks have one token, and would take more room than their scores.
        if self._fresh == _FRESH:
            self._fresh = 0
            first = self._chunks[-_FRESH][0]
            # In a list of its own: long receipts are written in another thread, which may be going through this one.
            self._chunks = [*self._chunks[:-_FRESH], (first, self._found(first, self.end))]

    def since(self, position: int) -> np.ndarray:
        """Returns the scores received from a position on, float32 ``[reads, tokens]``."""
        return self._between(position, max(position, self.end))

    def to_numpy(self, num_tokens: int | None = None) -> np.ndarray:
        """Returns the scores by absolute position.

        Args:
            num_tokens: Tokens of prompt and answer; None takes all that have scores.

        Returns:
            Float32 ``[reads, num_tokens]``, NaN where a token has no score.
        """
        return self._between(0, self.end if num_tokens is None else num_tokens)

    def _between(self, start: int, end: int) -> np.ndarray:
        found = self._found(start, end).T
        positions = np.arange(start, end)
        covered = [read.covers(positions) for read in self.reads]
        return np.where(covered, found, np.float32(np.nan))

    def _found(self, start: int, end: int) -> np.ndarray:
        """What has come, float32 ``[end - start, reads]``, whether a read covers it or not."""
        scores = np.full((end - start, len(self.reads)), np.nan, dtype=np.float32)
        for begin, rows in reversed(self._chunks):
            if begin + len(rows) <= start:
                break
            low, high = max(begin, start), min(begin + len(rows), end)
            if low < high:
                scores[low - start : high - start] = rows[
                    low - begin : high - begin, : len(self.reads)
                ]
        return scores


def read(outputs: Any) -> np.ndarray:
    """Returns the scores of vLLM's outputs.

    Args:
        outputs: A ``RequestOutput``, or several, as ``LLM.generate`` and ``LLM.chat`` return them, of
            requests with the same number of reads.

    Returns:
        Float32 ``[answers, reads, tokens]`` with the answers of all outputs in order, by absolute position:
        the prompt's first token has position 0. NaN where a token has no score, and after the end of shorter
        answers.

    Raises:
        ValueError: A request has no reads, or another number of reads than the others.
    """
    given = outputs if isinstance(outputs, Iterable) else [outputs]
    found = []
    for output in given:
        for answer in output.outputs:
            scores: Scores | None = getattr(answer, SCORES_ATTRIBUTE, None)
            if scores is None:
                raise ValueError(f"request {output.request_id} read nothing: it has no 'read'")
            found.append(scores.to_numpy(scores.prompt_len + len(answer.token_ids)))
    counts = {len(scores) for scores in found}
    if len(counts) > 1:
        raise ValueError(f"the requests read different numbers of directions: {sorted(counts)}")
    longest = max((scores.shape[1] for scores in found), default=0)
    padded = np.full((len(found), max(counts, default=0), longest), np.nan, dtype=np.float32)
    for number, each in enumerate(found):
        padded[number, :, : each.shape[1]] = each
    return padded
