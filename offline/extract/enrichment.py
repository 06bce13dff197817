"""Does a token attend to the prefix more than to other tokens? A permutation test, block by block.

The paper names a concept enrichment score; its authors' code reads p-values that it does not compute.
Here the test is: the prefix's P positions against P positions drawn at random from those that the
token can see, the first one left out. The first token takes attention from everywhere whatever the
prompt says; with it among the positions the test could hardly ever reject.

The drawn positions are the same for every head, block and prompt of a concept, as the prefix's are, so
that the test of a mean over heads and prompts keeps their dependence. A token that sees a window alone is
held against positions in it, as many as it sees of the prefix. Where attention chooses a block's token,
each random subset chooses its own in the same way before it is compared: a test at the token of the most
attention, as if it had been named before, would reject far too often.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import false_discovery_control
from torch import Tensor

from vllm_steer.errors import ExtractionError
from vllm_steer.offline.models.batches import Batch

Doubles = NDArray[np.float64]

# The level at which one row of attention counts as a hit, the authors' default.
HIT_LEVEL = 0.01
# Sums that differ by rounding are equal, and equal sums count against the prefix.
_TIE = 1e-6


@dataclass(frozen=True, eq=False)
class TokenChoice:
    """How attention chooses the token of each block; see ``vllm_steer.offline.estimators.labels.choose_tokens``.

    Attributes:
        prompts: ``[prompts]``, bool; those that it is chosen on.
        statistic: What is taken over them.
    """

    prompts: NDArray[np.bool_]
    statistic: Literal["max", "mean"]


@dataclass(frozen=True, eq=False)
class Enrichment:
    """What the test found, for every block and candidate token.

    Attributes:
        score: ``[blocks, candidates]``, float64; E, the share of prompts and heads whose p-value is
            below 0.01. About 0.01 where attention ignores the prefix.
        p_values: ``[blocks, candidates]``, float64; of the attention averaged over prompts and heads.
            They hold for a token that was named before.
        head_p_values: ``[blocks, candidates, heads]``, float64; of the average over prompts.
        chosen_p_values: ``[blocks]``, float64; of each block's own token, with its choice in the null
            distribution; None where no choice was told of.
    """

    score: Doubles
    p_values: Doubles
    head_p_values: Doubles
    chosen_p_values: Doubles | None = None

    @property
    def q_values(self) -> Doubles:
        """``p_values`` after Benjamini and Hochberg over the blocks, token by token."""
        adjusted: Doubles = false_discovery_control(self.p_values, axis=0)
        return adjusted

    @property
    def figures(self) -> dict[str, NDArray[np.float32]]:
        """What ``vllm_steer.offline.extract.figures`` keeps of it, by name, each ``[blocks, candidates]``, float32."""
        found = {
            "enrichment": self.score,
            "enrichment_p": self.p_values,
            "enrichment_q": self.q_values,
            "enriched_heads": self.enriched_heads,
        }
        return {name: values.astype(np.float32) for name, values in found.items()}

    def at(self, tokens: NDArray[np.int64]) -> tuple[Doubles, Doubles]:
        """Returns p- and q-values of the blocks at their tokens, each ``[blocks]``, float64.

        Args:
            tokens: ``[blocks]``; the chosen ones where attention chose, else fixed ones.
        """
        p_values = self.chosen_p_values
        if p_values is None:
            p_values = self.p_values[np.arange(len(tokens)), tokens]
        return p_values, false_discovery_control(p_values)

    @property
    def enriched_heads(self) -> Doubles:
        """``[blocks, candidates]``; share of heads at a false discovery rate of 0.05."""
        blocks, candidates, heads = self.head_p_values.shape
        by_token = self.head_p_values.transpose(0, 2, 1).reshape(blocks * heads, candidates)
        adjusted = false_discovery_control(by_token, axis=0).reshape(blocks, heads, candidates)
        share: Doubles = (adjusted <= 0.05).mean(axis=1)
        return share


def random_subsets(
    count: int, size: int, first: int, last: int, length: int, generator: np.random.Generator
) -> NDArray[np.uint8]:
    """Returns subsets of the keys ``first … last``, each of ``size`` keys, as 0/1 rows.

    Subsets of one generator state for other keys or another ``size`` are drawn by the same ranks, so
    they overlap as far as they can.

    Args:
        count: Number of subsets.
        size: Keys in each; 0 for empty ones.
        first: The first key that may be drawn.
        last: The last.
        length: Columns of the result.
        generator: Source of randomness.

    Returns:
        ``[count, length]``, uint8.
    """
    subsets = np.zeros((count, length), dtype=np.uint8)
    if size:
        ranks = generator.random((count, length))[:, first : last + 1]
        chosen = ranks.argpartition(size - 1, axis=1)[:, :size] + first
        np.put_along_axis(subsets, chosen, np.uint8(1), axis=1)
    return subsets


class PermutationTest:
    """Collects the test's figures from attention rows, batch after batch."""

    def __init__(
        self, count: int, seed: int, longest: int, choice: TokenChoice | None = None
    ) -> None:
        """Starts with nothing seen.

        Args:
            count: Number of random subsets, B; p-values are multiples of 1 / (B + 1).
            seed: Seed of the subsets.
            longest: Number of tokens of the longest prompt.
            choice: How attention chooses each block's token; None where tokens are fixed.
        """
        self._count, self._seed, self._longest, self._choice = count, seed, longest, choice
        self._subsets: dict[tuple[int, int, int], NDArray[np.uint8]] = {}
        self._prompts = 0
        self._hits: dict[int, Tensor] = {}
        self._observed: dict[int, Tensor] = {}
        self._null: dict[int, Tensor] = {}
        # [N, 1 + count] by block: what tokens are chosen by, for the prefix and each subset.
        self._choosing: dict[int, Tensor] = {}

    def begin(self, batch: Batch) -> None:
        """Takes the batch that the next calls of ``see`` are about.

        Raises:
            ExtractionError: A prompt has no prefix, or begins with it.
        """
        if any(start < 1 or end <= start for start, end in batch.spans.tolist()):
            raise ExtractionError(
                "a prompt's prefix is empty or begins at the first token, so its enrichment cannot be "
                "tested; set permutations to 0"
            )
        self._batch = batch
        # By the first key that each token sees: blocks of one window have the same.
        self._drawn: dict[bytes, Tensor] = {}
        self._prompts += len(batch.indices)

    def see(self, block: int, weights: Tensor, observed: Tensor) -> None:
        """Adds the batch at one block.

        Args:
            block: The block.
            weights: ``[batch, heads, N, keys]``, float32; 0 at keys that a token does not see.
            observed: ``[batch, heads, N]``, float32; attention to the prefix.
        """
        null = weights.transpose(1, 2) @ self._draw(weights)  # [batch, N, heads, count]
        by_token = observed.transpose(1, 2)
        larger = (null >= by_token[..., None] * (1 - _TIE)).sum(dim=-1)
        hits = (larger + 1 < HIT_LEVEL * (self._count + 1)).sum(dim=(0, 2))
        for sums, value in (
            (self._hits, hits),
            (self._observed, by_token.sum(dim=0).double()),
            (self._null, null.sum(dim=0).double()),
        ):
            sums[block] = sums[block] + value.cpu() if block in sums else value.cpu()
        if self._choice is not None:
            # The mean over heads is taken as for the choice itself, so that the two agree to the bit.
            means = torch.cat([observed.mean(dim=1)[..., None], null.mean(dim=2)], dim=-1)
            self._see_choice(block, means.cpu(), self._choice)

    def _see_choice(self, block: int, means: Tensor, choice: TokenChoice) -> None:
        """Adds the mean attention ``[batch, N, 1 + count]`` to prefix and subsets."""
        means = means[torch.from_numpy(choice.prompts[list(self._batch.indices)])]
        if not len(means):
            return
        if choice.statistic == "max":
            value, join = means.amax(dim=0), torch.maximum
        else:
            value, join = means.double().sum(dim=0), torch.add
        before = self._choosing.get(block)
        self._choosing[block] = value if before is None else join(before, value)

    def _draw(self, weights: Tensor) -> Tensor:
        """Returns the subsets for every prompt and candidate, ``[batch, N, keys, count]``, float32."""
        batch = self._batch
        # The window is read off the weights, whatever the family calls it. The first key of all is
        # not drawn; the first of a window is like its others.
        first = (weights.amax(dim=1) > 0).int().argmax(dim=-1).clamp(min=1).cpu().numpy()
        if (key := first.tobytes()) not in self._drawn:
            last = (batch.candidates + batch.shared).cpu().numpy()
            start, end = batch.spans.cpu().numpy().T[..., None]
            sizes = (np.minimum(end, last + 1) - np.maximum(start, first)).clip(0)
            drawn = [
                [
                    self._subset(*map(int, one))[:, : weights.shape[-1]].T
                    for one in zip(*row, strict=True)
                ]
                for row in zip(sizes, first, last, strict=True)
            ]
            subsets = torch.from_numpy(np.array(drawn, dtype=np.float32))
            self._drawn[key] = subsets.to(weights.device)
        return self._drawn[key]

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
            chosen_p_values=self._chosen(observed.sum(dim=2), null.sum(dim=2)),
        )

    def _chosen(self, observed: Tensor, null: Tensor) -> Doubles | None:
        """Returns the p-values ``[blocks]`` of what prefix and subsets come to at the token each chooses."""
        if self._choice is None:
            return None
        by = torch.stack([self._choosing[block] for block in range(len(observed))])
        sums = torch.cat([observed[..., None], null], dim=-1)  # [blocks, N, 1 + count]
        at = sums.gather(1, by.argmax(dim=1, keepdim=True))[:, 0]
        return self._p_values(at[:, 0], at[:, 1:])

    def _p_values(self, observed: Tensor, null: Tensor) -> Doubles:
        larger = (null >= observed[..., None] * (1 - _TIE)).sum(dim=-1)
        values: Doubles = ((larger + 1).double() / (self._count + 1)).numpy()
        return values

    def _subset(self, size: int, first: int, last: int) -> NDArray[np.uint8]:
        if (size, first, last) not in self._subsets:
            self._subsets[size, first, last] = random_subsets(
                self._count, size, first, last, self._longest, np.random.default_rng(self._seed)
            )
        return self._subsets[size, first, last]
