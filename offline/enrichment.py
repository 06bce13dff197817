"""Does a token attend to the prefix more than to other tokens? A permutation test, block by block.

The paper names a concept enrichment score; its authors' code reads p-values that it does not compute.
Here the test is: the prefix's P positions against P positions drawn at random from those that the
token can see, the first one left out. The first token takes attention from everywhere whatever the
prompt says; with it among the positions the test could hardly ever reject.

The drawn positions are the same for every head, block and prompt of a concept, as the prefix's are, so
that the test of a mean over heads and prompts keeps their dependence.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import false_discovery_control
from torch import Tensor

from offline.batches import Batch
from vllm_steer.errors import ExtractionError

logger = logging.getLogger(__name__)

Doubles = NDArray[np.float64]

# The level at which one row of attention counts as a hit, the authors' default.
HIT_LEVEL = 0.01
# Sums that differ by rounding are equal, and equal sums count against the prefix.
_TIE = 1e-6


@dataclass(frozen=True, eq=False)
class Enrichment:
    """What the test found, for every block and candidate token.

    Attributes:
        score: ``[blocks, candidates]``, float64; E, the share of prompts and heads whose p-value is
            below 0.01. About 0.01 where attention ignores the prefix.
        p_values: ``[blocks, candidates]``, float64; of the attention averaged over prompts and heads.
        head_p_values: ``[blocks, candidates, heads]``, float64; of the average over prompts.
    """

    score: Doubles
    p_values: Doubles
    head_p_values: Doubles

    @property
    def q_values(self) -> Doubles:
        """``p_values`` after Benjamini and Hochberg over the blocks, token by token."""
        adjusted: Doubles = false_discovery_control(self.p_values, axis=0)
        return adjusted

    @property
    def enriched_heads(self) -> Doubles:
        """``[blocks, candidates]``; share of heads at a false discovery rate of 0.05."""
        blocks, candidates, heads = self.head_p_values.shape
        by_token = self.head_p_values.transpose(0, 2, 1).reshape(blocks * heads, candidates)
        adjusted = false_discovery_control(by_token, axis=0).reshape(blocks, heads, candidates)
        share: Doubles = (adjusted <= 0.05).mean(axis=1)
        return share


def random_subsets(
    count: int, size: int, last: int, length: int, generator: np.random.Generator
) -> NDArray[np.uint8]:
    """Returns subsets of the keys ``1 … last``, each of ``size`` keys, as 0/1 rows.

    Subsets of one generator state for another ``last`` or ``size`` are drawn by the same ranks, so
    they overlap as far as they can.

    Args:
        count: Number of subsets.
        size: Keys in each.
        last: The last key that may be drawn.
        length: Columns of the result.
        generator: Source of randomness.

    Returns:
        ``[count, length]``, uint8.
    """
    ranks = generator.random((count, length))
    chosen = ranks[:, 1 : last + 1].argpartition(size - 1, axis=1)[:, :size] + 1
    subsets = np.zeros((count, length), dtype=np.uint8)
    np.put_along_axis(subsets, chosen, np.uint8(1), axis=1)
    return subsets


class PermutationTest:
    """Collects the test's figures from attention rows, batch after batch."""

    def __init__(self, count: int, seed: int, longest: int) -> None:
        """Starts with nothing seen.

        Args:
            count: Number of random subsets, B; p-values are multiples of 1 / (B + 1).
            seed: Seed of the subsets.
            longest: Number of tokens of the longest prompt.
        """
        self._count, self._seed, self._longest = count, seed, longest
        self._subsets: dict[tuple[int, int], NDArray[np.uint8]] = {}
        self._prompts = 0
        self._hits: dict[int, Tensor] = {}
        self._observed: dict[int, Tensor] = {}
        self._null: dict[int, Tensor] = {}

    def draw(self, batch: Batch) -> Tensor:
        """Returns the subsets for every prompt and candidate, ``[batch, N, keys, count]``, float32.

        Raises:
            ExtractionError: A prompt has no prefix, or begins with it.
        """
        keys = batch.shared + batch.token_ids.shape[1]
        spans, rows = batch.spans.tolist(), batch.candidates + batch.shared
        if any(start < 1 or end <= start for start, end in spans):
            raise ExtractionError(
                "a prompt's prefix is empty or begins at the first token, so its enrichment cannot be "
                "tested; set permutations to 0"
            )
        drawn = [
            [self._subset(end - start, int(row))[:, :keys].T for row in candidates]
            for (start, end), candidates in zip(spans, rows, strict=True)
        ]
        self._prompts += len(spans)
        return torch.from_numpy(np.array(drawn, dtype=np.float32)).to(batch.token_ids.device)

    def see(self, block: int, weights: Tensor, observed: Tensor, subsets: Tensor) -> None:
        """Adds one batch at one block.

        Args:
            block: The block.
            weights: ``[batch, heads, N, keys]``, float32.
            observed: ``[batch, heads, N]``, float32; attention to the prefix.
            subsets: What ``draw`` returned.
        """
        null = weights.transpose(1, 2) @ subsets  # [batch, N, heads, count]
        observed = observed.transpose(1, 2)
        larger = (null >= observed[..., None] * (1 - _TIE)).sum(dim=-1)
        hits = (larger + 1 < HIT_LEVEL * (self._count + 1)).sum(dim=(0, 2))
        for sums, value in (
            (self._hits, hits),
            (self._observed, observed.sum(dim=0).double()),
            (self._null, null.sum(dim=0).double()),
        ):
            sums[block] = sums[block] + value.cpu() if block in sums else value.cpu()

    def result(self) -> Enrichment:
        """Returns the figures of all batches seen."""
        blocks = range(len(self._hits))
        hits, observed, null = (
            torch.stack([sums[block] for block in blocks])
            for sums in (self._hits, self._observed, self._null)
        )
        heads = observed.shape[2]
        return Enrichment(
            score=(hits.double() / (self._prompts * heads)).numpy(),
            p_values=self._p_values(observed.sum(dim=2), null.sum(dim=2)),
            head_p_values=self._p_values(observed, null),
        )

    def _p_values(self, observed: Tensor, null: Tensor) -> Doubles:
        larger = (null >= observed[..., None] * (1 - _TIE)).sum(dim=-1)
        values: Doubles = ((larger + 1).double() / (self._count + 1)).numpy()
        return values

    def _subset(self, size: int, last: int) -> NDArray[np.uint8]:
        if (size, last) not in self._subsets:
            self._subsets[size, last] = random_subsets(
                self._count, size, last, self._longest, np.random.default_rng(self._seed)
            )
        return self._subsets[size, last]


def choose_blocks(
    score: Doubles, layers: list[int], choice: str, count: int | None, threshold: float | None
) -> list[int]:
    """Returns the blocks to learn directions for, ascending.

    Args:
        score: ``[blocks]``, float64; enrichment of each block at its chosen token.
        layers: Blocks to choose among.
        choice: ``all``, ``top_k``, ``bottom_k`` or ``threshold``.
        count: k of the former two; the lower block wins a tie.
        threshold: Least score of the latter.

    Returns fewer than k where fewer have a score above 0: the others would be chosen without a reason.

    Raises:
        ExtractionError: No block reaches the threshold, or none of ``top_k`` has a score above 0.
    """
    if choice == "threshold":
        chosen = [layer for layer in layers if score[layer] >= (threshold or 0.0)]
        if not chosen:
            raise ExtractionError(
                f"no block reaches block_threshold {threshold}; the largest enrichment score is "
                f"{max(score[layer] for layer in layers):.4f}"
            )
        return chosen
    if choice == "top_k":
        scored = [layer for layer in layers if score[layer] > 0]
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
        layers = scored
    sign = {"all": 0, "top_k": -1, "bottom_k": 1}[choice]
    return sorted(sorted(layers, key=lambda layer: (sign * score[layer], layer))[:count])
