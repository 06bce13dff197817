"""The choice of blocks: those whose token attends to the prefix, and among them by enrichment."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from vllm_steer.errors import ExtractionError

logger = logging.getLogger(__name__)


def seeing_blocks(attention: NDArray[np.float32], blocks: Sequence[int], concept: str) -> list[int]:
    """Returns the blocks that have soft labels; a warning names the others.

    A block whose sliding window does not reach the prefix never attends to it, whatever the prompt.

    Args:
        attention: ``[prompts, blocks]``, float32; to the prefix, of the prefixed prompts, each block's at
            its own token.
        blocks: Blocks to choose among.
        concept: Name of the concept, for messages.

    Raises:
        ExtractionError: No block pays the prefix any attention.
    """
    seeing = [block for block in blocks if attention[:, block].any()]
    if not seeing:
        raise ExtractionError(
            f"concept {concept!r}: no block of {list(blocks)} pays the prefix any attention at its token, as "
            f"where a sliding window is shorter than what stands between them; set labels to 'hard', or ask "
            f"shorter statements"
        )
    if blind := [block for block in blocks if block not in seeing]:
        logger.warning(
            "concept %r: blocks %s are left out: their tokens pay the prefix no attention, as where a sliding "
            "window is shorter than what stands between them, so that all their labels are equal",
            concept, blind,
        )  # fmt: skip
    return seeing


def choose_blocks(
    score: NDArray[np.float64],
    blocks: Sequence[int],
    choice: str,
    count: int | None,
    threshold: float | None,
) -> list[int]:
    """Returns the blocks to learn directions for, ascending.

    Args:
        score: ``[blocks]``, float64; enrichment of each block at its chosen token.
        blocks: Blocks to choose among.
        choice: ``all``, ``top_k``, ``bottom_k`` or ``threshold``.
        count: k of ``top_k`` and ``bottom_k``; the lower block wins a tie, and a warning says so.
        threshold: Least score of ``threshold``.

    Returns fewer than k if fewer have a score above 0, since there is no reason to choose the others.

    Raises:
        ExtractionError: No block reaches the threshold, or none of ``top_k`` has a score above 0.
    """
    if choice == "all":
        return list(blocks)
    if choice == "threshold":
        chosen = [block for block in blocks if score[block] >= (threshold or 0.0)]
        if not chosen:
            raise ExtractionError(
                f"no block reaches block_threshold {threshold}; the largest enrichment score is "
                f"{max(score[block] for block in blocks):.4f}"
            )
        return chosen
    if choice == "top_k":
        scored = [block for block in blocks if score[block] > 0]
        if not scored:
            raise ExtractionError(
                "no block has an enrichment score above 0, so that top_k has nothing to choose by; use "
                "block_choice 'all', or more permutations"
            )
        if count is not None and len(scored) < count:
            logger.warning(
                "block_count is %d, but only %d blocks have an enrichment score above 0: %s",
                count, len(scored), scored,
            )  # fmt: skip
        blocks = scored
    sign = -1 if choice == "top_k" else 1
    ranked = sorted(blocks, key=lambda block: (sign * score[block], block))
    if count is not None and count < len(ranked):
        edge = score[ranked[count]]
        if edge == score[ranked[count - 1]]:
            tied = [block for block in ranked if score[block] == edge]
            logger.warning(
                "block_count %d cuts through blocks of the same enrichment score %.4f: of %s the lower ones are "
                "taken, which nothing but their order tells from the others",
                count, edge, tied,
            )  # fmt: skip
    return sorted(ranked[:count])
