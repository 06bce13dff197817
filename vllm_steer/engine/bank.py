"""The persistent device tensors: the change of each row at each layer, and the row of each token.

Both are allocated once, before memory profiling, compilation and graph capture; afterwards only
their contents change. Row 0 (``rows.ZERO_ROW``) is zeros, is never written, and is read by padding and
unsteered tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import torch

from vllm_steer.engine.finite import limit_of
from vllm_steer.engine.row_values import NUMBERS, RowValues
from vllm_steer.engine.token_rows import TokenRows
from vllm_steer.request.schedule import factors


@dataclass(frozen=True)
class BankShape:
    """Sizes of a bank.

    Attributes:
        layers: Hooked layers.
        num_rows: Rows, including the zero row.
        hidden_size: Width of the residual stream.
        max_num_tokens: Largest number of tokens of a step.
        rank: Components of the affine form; 0 if rows are only added.
        multiply: Whether a row has factors of the dimensions.
    """

    layers: tuple[int, ...]
    num_rows: int
    hidden_size: int
    max_num_tokens: int
    rank: int = 0
    multiply: bool = False


class SteeringBank:
    """Vectors and token rows of one worker.

    Attributes:
        layers: Hooked layers, ascending.
        index: Layer to its index in ``vectors``.
        vectors: ``[len(layers), num_rows, hidden_size]``, model dtype.
        left: ``[len(layers), num_rows, rank, hidden_size]``, model dtype.
        readers: ``[len(layers), num_rows, 2 * rank, hidden_size]``, model dtype.
        numbers: ``[len(layers), num_rows, NUMBERS, rank]``, float32.
        restore: ``[len(layers), num_rows]``, float32.
        diagonal: ``[len(layers), num_rows, hidden_size]``, model dtype; empty without ``multiply``.
        rows: ``[max_num_tokens]`` int32, the row of each token of the step.
        factors: ``[max_num_tokens, 1 + rank]`` float32, the factors of each token's vector and
            components; read only by the affine form.
        rank: Components of the affine form.
        hidden_size: Width of the residual stream.
        multiply: Whether a row has factors of the dimensions.
    """

    def __init__(self, shape: BankShape, dtype: torch.dtype, device: torch.device) -> None:
        """Allocates the bank.

        Args:
            shape: Its sizes.
            dtype: Model dtype.
            device: Device of the model.
        """
        num_rows, max_num_tokens = shape.num_rows, shape.max_num_tokens
        rank, hidden_size = shape.rank, shape.hidden_size
        self.layers = shape.layers
        self.index = {layer: position for position, layer in enumerate(self.layers)}

        def make(*size: int, dtype: torch.dtype = dtype) -> torch.Tensor:
            return torch.zeros(len(self.layers), num_rows, *size, dtype=dtype, device=device)

        self.rank, self.hidden_size, self.multiply = rank, hidden_size, shape.multiply
        self.vectors = make(hidden_size)
        self.left = make(rank, hidden_size)
        self.readers = make(2 * rank, hidden_size)
        self.numbers = make(NUMBERS, rank, dtype=torch.float32)
        self.restore = make(dtype=torch.float32) if rank else make(0)
        self.diagonal = make(hidden_size if shape.multiply else 0)
        self.rows = torch.zeros(max_num_tokens, dtype=torch.int32, device=device)
        self.factors = torch.ones(max_num_tokens, 1 + rank, dtype=torch.float32, device=device)
        # Tokens from here on have factor 1.
        self._scaled = 0
        # Tokens from here on have row 0.
        self._written = 0
        # Rows of the first of them, if the host knows them.
        self._known: np.ndarray | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes of device memory held."""
        return self.rows.nbytes + sum(tensor.nbytes for tensor in self._tensors.values())

    @property
    def _tensors(self) -> dict[str, torch.Tensor]:
        """The tensors by their names in ``RowValues``."""
        names = [field.name for field in fields(RowValues)]
        return {name: tensor for name in names if (tensor := getattr(self, name)).numel()}

    def write_row(self, row: int, values: RowValues) -> bool:
        """Replaces the values of a row at every layer, without waiting for the device.

        Args:
            row: Row to write, at least 1.
            values: Its values, of the bank's rank.

        Returns:
            Whether they were cut to the limits of the model's dtype.
        """
        if not 0 < row < self.vectors.shape[1]:
            raise IndexError(f"row {row} is not one of 1 to {self.vectors.shape[1] - 1}")
        # Values stay finite, whatever the request.
        dtype = self.vectors.dtype
        values, cut = values.within(limit_of(dtype, len(self.layers)))
        for name, tensor in self._tensors.items():
            value = torch.from_numpy(getattr(values, name)).to(tensor.dtype)
            tensor[:, row].copy_(self._upload(value))
        return cut

    def apply(
        self, step: TokenRows, positions: torch.Tensor, states: torch.Tensor | None = None
    ) -> None:
        """Sets the row and factor of each token of a step; new rows must be written before.

        Args:
            step: The step's plan.
            positions: Absolute position of each token on the device; may be longer than the step.
            states: int32 ``[num_tokens]``, which matches hold at each token; None where none count.
        """
        if step.rows is not None:
            self.set_rows(step.rows, step.factors)
        elif step.owners is not None and step.ranges is not None:
            here = positions[: len(step.owners)]
            self.assign_rows(step.owners, step.ranges, step.schedules, here, states)
        else:
            self.clear_rows()

    def assign_rows(
        self,
        owners: np.ndarray,
        ranges: np.ndarray,
        schedules: np.ndarray | None,
        positions: torch.Tensor,
        states: torch.Tensor | None = None,
    ) -> None:
        """Sets the row of each token of a step from the range that contains its position.

        The positions are read on the device: under speculative decoding the host does not know
        them, nor, where they decide, the tokens. Tokens in no range, and all others up to the longest
        step, including padding, get row 0.

        Args:
            owners: int32 ``[num_tokens]``, index of each token's request.
            ranges: int32 ``[RANGE_FIELDS, most ranges of a request, num_requests]``: first positions,
                positions after the last, rows, masks and states of matches; for one request, at most one
                holds at any token.
            schedules: float32 ``[SCHEDULE_FIELDS, 1 + rank, most ranges, num_requests]``; None for
                factor 1.
            positions: ``[num_tokens]``, absolute position of each token, on the device.
            states: int32 ``[num_tokens]``, which matches hold at each token, on the device; None where none
                count.
        """
        owner = self._upload(torch.from_numpy(owners))
        start, end, row, mask, state = self._upload(torch.from_numpy(ranges))[:, :, owner]
        inside = (start <= positions) & (positions < end)
        if states is not None:
            inside &= (states & mask) == state
        self._set((row * inside).sum(0, dtype=torch.int32))
        self._known = None
        if schedules is None:
            self._set_factors(None)
        else:
            table = self._upload(torch.from_numpy(schedules))[..., owner]
            self._set_factors((factors(positions, table) * inside).sum(1))

    def set_rows(self, rows: np.ndarray, factors: np.ndarray | None = None) -> None:
        """Sets the row of each token of the step; all other tokens, including padding, get row 0.

        Rows are only sent to the device if they differ from the previous step's.

        Args:
            rows: int32 ``[num_tokens]``.
            factors: float32 ``[1 + rank, num_tokens]``; None is 1 everywhere.
        """
        self._set_factors(None if factors is None else self._upload(torch.from_numpy(factors)))
        if self._known is not None and np.array_equal(rows, self._known):
            return
        self._set(self._upload(torch.from_numpy(rows)))
        self._known = rows

    def forget_known(self) -> None:
        """Notes that the rows were changed on the device, so the host no longer knows them."""
        self._known = None

    def clear_rows(self) -> None:
        """Makes every token read the zero row; free if they already do."""
        self._set_factors(None)
        if self._written:
            self.rows[: self._written].zero_()
            self._written = 0
            self._known = None

    def _set_factors(self, values: torch.Tensor | None) -> None:
        count = 0 if values is None else values.shape[1]
        if values is not None:
            self.factors[:count].copy_(values.T)
        if count < self._scaled:
            self.factors[count : self._scaled].fill_(1.0)
        self._scaled = count

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
