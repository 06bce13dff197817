"""States of answers' tokens, one for each answer and block, in the order of the answers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from vllm_steer.offline.extract.capture import check_finite
from vllm_steer.offline.models.hooks import watched
from vllm_steer.offline.models.loading import find_blocks
from vllm_steer.offline.rollouts.methods import Pool
from vllm_steer.offline.rollouts.sampled import Rollout

Floats = NDArray[np.float32]
Rows = NDArray[np.int64]


def read_states(
    model: PreTrainedModel,
    rollouts: Sequence[Rollout],
    pool: Pool,
    batch_size: int,
    progress: str | None = None,
) -> Floats:
    """Returns the state of every answer after every block, ``[answers, blocks, hidden_size]``, float32.

    Args:
        model: A decoder-only model.
        rollouts: The answers, none of them empty.
        pool: How an answer's tokens become one state: that of the last, their mean, or in each coordinate the largest of
            those that the answer's tokens are predicted from, which is where a generating model is steered.
        batch_size: Answers in a forward pass.
        progress: Label of the progress bar; None for no bar.

    Raises:
        ExtractionError: The model's blocks cannot be found, or a block output is not finite.
    """
    config = model.config.get_text_config()
    blocks = find_blocks(model, config.num_hidden_layers)
    found = np.zeros((len(rollouts), len(blocks), config.hidden_size), dtype=np.float32)
    by_length = np.argsort([len(r.prompt) + len(r.answer) for r in rollouts], kind="stable")
    model.train(False)
    with (
        torch.inference_mode(),
        tqdm(total=len(rollouts), desc=progress, unit="answer", disable=progress is None) as bar,
    ):
        for start in range(0, len(rollouts), batch_size):
            rows = by_length[start : start + batch_size]
            batch = _Batch([rollouts[row] for row in rows], pool, model.device)

            def see(block: int, output: Tensor, batch: _Batch = batch, rows: Rows = rows) -> None:
                found[rows, block] = batch.pooled(output.float()).cpu().numpy()

            with watched(blocks, see):
                # Right padding: a causal model sees none of it, so that no mask is needed.
                model.base_model(input_ids=batch.token_ids, use_cache=False)
            bar.update(len(rows))
    check_finite(found[:, :, None])
    return found


class _Batch:
    """Prompts with their answers, padded on the right, and the tokens that count."""

    def __init__(self, rollouts: Sequence[Rollout], pool: Pool, device: torch.device) -> None:
        rows = [[*r.prompt, *r.answer] for r in rollouts]
        length = max(map(len, rows))
        self.token_ids = torch.tensor(
            [row + [0] * (length - len(row)) for row in rows], device=device
        )
        first = torch.tensor([[len(r.prompt)] for r in rollouts], device=device)
        last = torch.tensor([[len(row) - 1] for row in rows], device=device)
        if pool == "last":
            first = last
        elif pool == "max":
            first, last = first - 1, last - 1
        position = torch.arange(length, device=device)
        self._counts = ((position >= first) & (position <= last))[:, :, None]
        self._pool = pool

    def pooled(self, output: Tensor) -> Tensor:
        """Returns one state a row, ``[rows, hidden_size]``, of ``[rows, length, hidden_size]``."""
        if self._pool == "max":
            return output.masked_fill(~self._counts, -torch.inf).amax(dim=1)
        return torch.where(self._counts, output, 0.0).sum(dim=1) / self._counts.sum(dim=1)
