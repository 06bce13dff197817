"""Scores of directions in the graph of a block: s_k = r_k·(h + a_k Δh), for each of a token's readers r.

h is the residual stream as the block returns it, Δh the change by the request's own directions, and a_k 1 for
a reader after the change, else 0. Readers are stored like rows of the bank: a table at each layer, and for
each token the rows of its readers. Row 0 is zeros, for all other tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

PROBES_BUFFER = "_steering_probes"
AFTER_BUFFER = "_steering_probe_after"
READ_ROWS_BUFFER = "_steering_read_rows"
SCORES_BUFFER = "_steering_scores"


class ReaderBank:
    """The persistent device tensors of one worker with reads.

    They are allocated once, before memory profiling, compilation and graph capture; afterwards only their
    contents change.

    Attributes:
        layers: Layers hooked in this worker, ascending.
        all_layers: Hooked layers of all pipeline stages, ascending.
        probes: ``[len(layers), num_rows, hidden_size]``, model dtype.
        after: ``[num_rows]`` float32, 1 if a row reads after the change, else 0.
        rows: ``[max_num_tokens, reads]`` int32, the rows of each token's readers.
        scores: ``[len(all_layers), max_num_tokens, reads]`` float32, written by each step's graph; zeros at layers of
            other stages.
    """

    def __init__(
        self,
        layers: Sequence[int],
        all_layers: Sequence[int],
        num_rows: int,
        reads: int,
        hidden_size: int,
        max_num_tokens: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Allocates the bank.

        Args:
            layers: Layers hooked in this worker.
            all_layers: Hooked layers of all pipeline stages.
            num_rows: Rows, including the zero row.
            reads: Readers of a token.
            hidden_size: Width of the residual stream.
            max_num_tokens: Largest number of tokens of a step.
            dtype: Model dtype.
            device: Device of the model.
        """
        self.layers, self.all_layers = tuple(layers), tuple(all_layers)
        size = (len(self.layers), num_rows, hidden_size)
        self.probes = torch.zeros(size, dtype=dtype, device=device)
        self.after = torch.zeros(num_rows, dtype=torch.float32, device=device)
        self.rows = torch.zeros(max_num_tokens, reads, dtype=torch.int32, device=device)
        self.scores = torch.zeros(len(self.all_layers), max_num_tokens, reads, device=device)
        # Tokens from here on have row 0; the rows of those before.
        self._known = np.zeros((0, reads), dtype=np.int32)

    @property
    def num_bytes(self) -> int:
        """Bytes of device memory held."""
        return sum(t.nbytes for t in (self.probes, self.after, self.rows, self.scores))

    def register(self, block: nn.Module, layer: int) -> None:
        """Registers the buffers in the block of a layer."""
        at = self.layers.index(layer)
        block.register_buffer(PROBES_BUFFER, self.probes[at], persistent=False)
        block.register_buffer(AFTER_BUFFER, self.after, persistent=False)
        block.register_buffer(READ_ROWS_BUFFER, self.rows, persistent=False)
        block.register_buffer(SCORES_BUFFER, self.scores_at(layer), persistent=False)

    def scores_at(self, layer: int) -> torch.Tensor:
        """The scores of one layer, ``[max_num_tokens, reads]`` float32."""
        return self.scores[self.all_layers.index(layer)]

    def write_row(self, row: int, vectors: np.ndarray, after: bool) -> None:
        """Replaces a row, without waiting for the device.

        Args:
            row: Row to write, at least 1.
            vectors: Float32 ``[len(layers), hidden_size]``.
            after: Whether it reads after the change.
        """
        if not 0 < row < len(self.after):
            raise IndexError(f"row {row} is not one of 1 to {len(self.after) - 1}")
        values = torch.from_numpy(vectors).to(self.probes.dtype)
        self.probes[:, row].copy_(self._upload(values))
        self.after[row] = float(after)

    def set_rows(self, rows: np.ndarray) -> None:
        """Sets the readers of each token of a step; all other tokens get row 0.

        Nothing is sent to the device if they equal the previous step's.

        Args:
            rows: int32 ``[num_tokens, reads]``.
        """
        before = len(self._known)
        if rows is self._known or np.array_equal(rows, self._known):
            return
        self.rows[: len(rows)].copy_(self._upload(torch.from_numpy(rows)))
        if len(rows) < before:
            self.rows[len(rows) : before].zero_()
        self._known = rows

    def clear_rows(self) -> None:
        """Makes every token read the zero row; free if they already do."""
        self.set_rows(np.zeros((0, self.rows.shape[1]), dtype=np.int32))

    def _upload(self, values: torch.Tensor) -> torch.Tensor:
        """Copies to the device; from pinned memory, so that the host does not wait."""
        if self.rows.is_cuda:
            values = values.pin_memory()
        return values.to(self.rows.device, non_blocking=True)


def has_readers(block: nn.Module) -> bool:
    """Whether a block writes scores; known at tracing time."""
    return hasattr(block, SCORES_BUFFER)


def write_scores(block: nn.Module, stream: torch.Tensor, change: torch.Tensor) -> None:
    """Writes the scores of every token into the buffer of its block; traced into the graph.

    Args:
        block: A block with the buffers.
        stream: Float32 ``[num_tokens, hidden_size]``, the residual stream before the change.
        change: Float32 of the same shape.
    """
    probes, after = getattr(block, PROBES_BUFFER), getattr(block, AFTER_BUFFER)
    scores = getattr(block, SCORES_BUFFER)
    count = stream.shape[-2]
    rows = getattr(block, READ_ROWS_BUFFER)[:count]
    # One at a time: all at once, an eager step would hold the readers of all its tokens.
    for number in range(rows.shape[1]):
        row = rows[:, number]
        seen = stream + after[row].unsqueeze(-1) * change
        found = (probes[row].float() * seen).sum(-1)
        scores[:count, number].copy_(found.flatten())
