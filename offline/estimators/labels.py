"""From prefix attention to token choices and labels.

Arrays are numpy. The attention array has shape ``[prompts, blocks, candidates]``, float32: the
head-mean attention of each candidate token to the prefix.
"""

from __future__ import annotations

from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from vllm_steer.errors import ExtractionError

Floats = NDArray[np.float32]
_Float = TypeVar("_Float", bound=np.floating[Any])


def choose_tokens(
    attention: Floats, statistic: Literal["max", "mean"] = "max"
) -> NDArray[np.int64]:
    """Returns the token of each block that attends most to the prefix (Eq. 3).

    Args:
        attention: ``[prompts, blocks, candidates]``, float32, of prefixed prompts only.
        statistic: Statistic over prompts: the maximum, as in Eq. 3, or the mean.

    Returns:
        ``[blocks]``, negative token indices in ``[-candidates, -1]``; the earlier token wins a tie.
    """
    over_prompts = attention.max(axis=0) if statistic == "max" else attention.mean(axis=0)
    tokens: NDArray[np.int64] = over_prompts.argmax(axis=-1) - attention.shape[-1]
    return tokens


def fixed_tokens(token: int, blocks: int, candidates: int) -> NDArray[np.int64]:
    """Returns the same token for every block: the baseline without attention.

    Raises:
        ExtractionError: The token is not among the candidates.
    """
    if not -candidates <= token <= -1:
        raise ExtractionError(
            f"token {token} is not a candidate; this chat template has tokens {-candidates} to -1"
        )
    return np.full(blocks, token)


def soft_labels(attention: Floats, tokens: NDArray[np.int64]) -> Floats:
    """Returns the label of each prompt at each block: its token's attention to the prefix (Eq. 4).

    Unprefixed prompts have an empty prefix, so their attention, and label, is exactly 0.

    Args:
        attention: ``[prompts, blocks, candidates]``, float32.
        tokens: ``[blocks]``, negative indices.

    Returns:
        ``[prompts, blocks]``, float32.
    """
    return attention[:, np.arange(attention.shape[1]), tokens]


def hard_labels(positive: NDArray[np.bool_]) -> Floats:
    """Returns 1 for prefixed prompts and 0 for others, float32, in the shape of ``positive``."""
    return positive.astype(np.float32)


def min_max(labels: NDArray[_Float]) -> NDArray[_Float]:
    """Returns labels scaled to [0, 1]; constant labels become zeros.

    Args:
        labels: ``[rows]``, floating; the dtype is kept.
    """
    spread = np.ptp(labels)
    scaled: NDArray[_Float] = (labels - labels.min()) / (spread or 1)
    return scaled


def interleave(positives: int, negatives: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Returns the order of training rows: positive, negative, positive, negative, …

    The split into training and validation rows is contiguous, so the order ensures that both parts hold both
    kinds. Unequal counts are spread evenly.

    Returns:
        order: ``[rows]``, indices into the positives followed by the negatives.
        positive: ``[rows]``, bool, of the ordered rows.
    """
    position = np.concatenate([np.arange(positives) / positives, np.arange(negatives) / negatives])
    order = np.argsort(position, kind="stable")
    return order, order < positives
