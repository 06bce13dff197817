"""Rehearses steering while the demo model is trained.

A small model that learns a few dozen concepts keeps them far apart and answers an added vector with the
nearest one. So in the last stage a share of the plain rows is answered with a concept's words while the
concept's mean difference, measured on earlier batches, is added to the residual stream. The vectors that
steer the finished model are learned anew from prompts only; the model was trained with similar vectors, never
with these.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from vllm_steer.offline.demo.batches import Batch
from vllm_steer.offline.demo.concepts import all_concepts

# The share of the old mean in each new one.
_MOMENTUM = 0.7
SCALES = (6.0, 12.0)
# Length of the random vector added to each unit vector, similar to the deviation of a direction learned from
# a few hundred prompts.
_JITTER = 0.4


class Rehearsal:
    """Mean differences of all concepts, and their addition in a forward pass."""

    def __init__(self, blocks: nn.ModuleList, hidden_size: int) -> None:
        """Makes an object without means.

        Args:
            blocks: The model's decoder blocks; all but the first are steered.
            hidden_size: Width of the residual stream.
        """
        self._blocks = blocks
        shape = (len(all_concepts()) + 1, len(blocks), hidden_size)
        # The last row is for plain prompts.
        self._means = torch.zeros(shape)
        self._known = torch.zeros(shape[0], dtype=torch.bool)

    @contextmanager
    def around(self, batch: Batch) -> Iterator[None]:
        """Within it, the batch's steered rows are steered and its open rows are measured."""
        added = self._added(batch)
        handles = [
            block.register_forward_hook(self._hook(index, batch, added))
            for index, block in enumerate(self._blocks)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        self._known[batch.measured[batch.measured >= 0]] = True

    def _added(self, batch: Batch) -> torch.Tensor:
        """The vectors added to each row at each block, ``[blocks, rows, hidden_size]``."""
        means = self._means[batch.steered] - self._means[-1]
        noise = torch.randn_like(means) * (_JITTER / means.shape[-1] ** 0.5)
        unit = nn.functional.normalize(nn.functional.normalize(means, dim=-1) + noise, dim=-1)
        low, high = SCALES
        scale = low + (high - low) * torch.rand(len(unit), 1, 1)
        unit[~(self._known[batch.steered] & (batch.steered >= 0))] = 0.0
        unit[:, 0] = 0.0
        return (scale * unit).transpose(0, 1)

    def _hook(self, index: int, batch: Batch, added: torch.Tensor) -> Any:
        def steer(_block: nn.Module, _args: Any, hidden: torch.Tensor) -> torch.Tensor:
            self._measure(index, batch, hidden.detach())
            return hidden + added[index][:, None]

        return steer

    def _measure(self, index: int, batch: Batch, hidden: torch.Tensor) -> None:
        for row in (batch.measured >= 0).nonzero()[:, 0].tolist():
            who = int(batch.measured[row])
            mean = hidden[row, batch.template[row]].float().mean(0)
            old = _MOMENTUM if self._known[who] else 0.0
            self._means[who, index] = old * self._means[who, index] + (1 - old) * mean
