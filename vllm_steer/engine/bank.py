"""The persistent device tensors: vectors by layer and row, and the row of each token.

Both are allocated once, before memory profiling, compilation and graph capture; afterwards only
their contents change. Row 0 (``rows.ZERO_ROW``) is zeros, is never written, and is what padding
and unsteered tokens read.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch


class SteeringBank:
    """Vectors and token rows of one worker.

    Attributes:
        layers: Hooked layers, ascending.
        index: Layer to its index in ``vectors``.
        vectors: ``[len(layers), num_rows, hidden_size]``, model dtype.
        rows: ``[max_num_tokens]`` int32, the row of each token of the step.
    """

    def __init__(
        self,
        layers: Sequence[int],
        num_rows: int,
        hidden_size: int,
        max_num_tokens: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.layers = tuple(layers)
        self.index = {layer: position for position, layer in enumerate(self.layers)}
        self.vectors = torch.zeros(
            len(self.layers), num_rows, hidden_size, dtype=dtype, device=device
        )
        self.rows = torch.zeros(max_num_tokens, dtype=torch.int32, device=device)
        # Tokens from here on have row 0.
        self._written = 0
        # What the first of them have, where the host knows it.
        self._known: np.ndarray | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes of device memory held."""
        return self.vectors.nbytes + self.rows.nbytes

    def write_row(self, row: int, values: np.ndarray) -> None:
        """Replaces the vectors of a row at every layer, without waiting for the device.

        Args:
            row: Row to write, at least 1.
            values: Float32 ``[len(layers), hidden_size]``.
        """
        if not 0 < row < self.vectors.shape[1]:
            raise IndexError(f"row {row} is not one of 1 to {self.vectors.shape[1] - 1}")
        self.vectors[:, row].copy_(self._upload(torch.from_numpy(values).to(self.vectors.dtype)))

    def assign_rows(self, owners: np.ndarray, ranges: np.ndarray, positions: torch.Tensor) -> None:
        """Gives each token of the step the row of the range that its position lies in.

        The positions are read on the device: under speculative decoding the host does not know
        them. Tokens in no range, and all others up to the longest step, padding too, get row 0.

        Args:
            owners: int32 ``[num_tokens]``, index of each token's request.
            ranges: int32 ``[3, most ranges of a request, num_requests]``: first positions,
                positions after the last, rows; disjoint for one request.
            positions: ``[num_tokens]``, absolute position of each token, on the device.
        """
        owner = self._upload(torch.from_numpy(owners))
        start, end, row = self._upload(torch.from_numpy(ranges))[:, :, owner]
        inside = (start <= positions) & (positions < end)
        self._set((row * inside).sum(0, dtype=torch.int32))
        self._known = None

    def set_rows(self, rows: np.ndarray) -> None:
        """Sets the row of each token of the step; all other tokens, padding too, get row 0.

        Nothing is sent to the device when the rows are those of the step before.

        Args:
            rows: int32 ``[num_tokens]``.
        """
        if self._known is not None and np.array_equal(rows, self._known):
            return
        self._set(self._upload(torch.from_numpy(rows)))
        self._known = rows

    def clear_rows(self) -> None:
        """Makes every token read the zero row; free when they already do."""
        if self._written:
            self.rows[: self._written].zero_()
            self._written = 0
            self._known = None

    def _set(self, rows: torch.Tensor) -> None:
        count = len(rows)
        self.rows[:count].copy_(rows)
        if count < self._written:
            self.rows[count : self._written].zero_()
        self._written = count

    def _upload(self, values: torch.Tensor) -> torch.Tensor:
        """Copies to the device; from pinned memory, so that the host does not wait."""
        if self.rows.is_cuda:
            values = values.pin_memory()
        return values.to(self.rows.device, non_blocking=True)
