"""Scores on their way to the front end, and as they are returned: by absolute position.

Importing this module imports neither torch nor vllm.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np

from vllm_steer.plan.reads import Read, StopRule

# The key in ``EngineCoreOutput.kv_transfer_params``, the one field of vLLM's outputs that holds anything; the
# front end takes it out before anybody looks.
CARRIER = "_vllm_steer_scores"
# Where a ``CompletionOutput`` of vLLM has its scores.
SCORES_ATTRIBUTE = "steering_scores"


class _Message(msgspec.Struct, frozen=True):
    start: int
    reads: int
    scores: bytes


def pack_scores(start: int, scores: np.ndarray) -> bytes:
    """Returns the message of some scores.

    Args:
        start: Position of the first.
        scores: Float32 ``[reads, tokens]``.
    """
    message = _Message(start, len(scores), scores.astype("<f4").tobytes())
    return msgspec.msgpack.encode(message)


def unpack_scores(message: bytes) -> tuple[int, np.ndarray]:
    """Inverse of :func:`pack_scores`."""
    found = msgspec.msgpack.decode(message, type=_Message)
    return found.start, np.frombuffer(found.scores, dtype="<f4").reshape(found.reads, -1)


@dataclass(eq=False)
class Scores:
    """The scores of one answer and its prompt.

    A token has a score where a read covers it and the model has read it here: not the last token of an answer,
    nor tokens of the prompt that the prefix cache had.

    Attributes:
        reads: What was read.
        prompt_len: Tokens of the prompt.
        rules: By which of them the answer ends.
        chunks: First position and scores, float32 ``[reads, tokens]``, of what has come, in order of position.
    """

    reads: tuple[Read, ...]
    prompt_len: int
    rules: tuple[StopRule, ...] = ()
    chunks: list[tuple[int, np.ndarray]] = field(default_factory=list)

    @property
    def names(self) -> tuple[str, ...]:
        """``pack/direction`` of each read."""
        return tuple(read.name for read in self.reads)

    @property
    def end(self) -> int:
        """Position after the last that has come."""
        return max((start + found.shape[1] for start, found in self.chunks), default=0)

    def since(self, position: int) -> np.ndarray:
        """Returns the scores from a position on, float32 ``[reads, tokens]``, as many as have come."""
        tail = Scores(self.reads, self.prompt_len)
        for start, found in reversed(self.chunks):
            if start + found.shape[1] <= position:
                break
            tail.chunks.insert(0, (start, found))
        return tail.to_numpy()[:, position:]

    def to_numpy(self, num_tokens: int | None = None) -> np.ndarray:
        """Returns the scores by absolute position.

        Args:
            num_tokens: Tokens of prompt and answer; None takes as many as have come.

        Returns:
            Float32 ``[reads, num_tokens]``, NaN where a token has no score.
        """
        length = self.end if num_tokens is None else num_tokens
        scores = np.full((len(self.reads), length), np.nan, dtype=np.float32)
        for start, found in self.chunks:
            kept = found[:, : max(0, length - start)]
            scores[:, start : start + kept.shape[1]] = kept
        return scores


def read(outputs: Any) -> np.ndarray:
    """Returns the scores of vLLM's outputs.

    Args:
        outputs: A ``RequestOutput``, or several, as ``LLM.generate`` and ``LLM.chat`` return them, of requests that
            read as much as each other.

    Returns:
        Float32 ``[answers, reads, tokens]`` with the answers of all outputs in their order, by absolute position:
        the prompt's first token has position 0. NaN where a token has no score, and after the end of an answer that
        is shorter than others.

    Raises:
        ValueError: An answer has no scores, since its request read nothing, or another number of them.
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
